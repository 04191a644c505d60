"""Runs the models: each reads the same windows, and each scored token is counted once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from neoquant.distributed import SINGLE_PROCESS, ProcessGroup
from neoquant.errors import CheckpointError, RequestError
from neoquant.evaluation.accumulator import Accumulator, TokenScores
from neoquant.evaluation.corpus import Corpus, Window
from neoquant.evaluation.journal import Journal
from neoquant.model.transfers import on_host, to_device
from neoquant.progress import Progress


class BatchLimits(NamedTuple):
    """How much is computed at once. A CPU is fastest with what stays in its cache, a GPU with large pieces."""

    positions: int  # read in one batch (or one window, if that is longer)
    rows: int  # of logits, for each of two models


CPU_LIMITS = BatchLimits(positions=1024, rows=128)
GPU_LIMITS = BatchLimits(positions=16384, rows=1024)


def batch_limits(device: torch.device) -> BatchLimits:
    """The fastest on such a device."""
    return CPU_LIMITS if device.type == "cpu" else GPU_LIMITS


TOP_TOKENS = 3
"""Likeliest tokens that are kept of each prediction."""


class Model(Protocol):
    """What the evaluation needs of a causal language model (ours and transformers' alike)."""

    @property
    def config(self) -> Any: ...

    @property
    def transformer(self) -> Callable[..., Any]:
        """(input_ids[B, T]) -> .last_hidden_state[B, T, C]"""

    @property
    def lm_head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """[..., C] -> [..., V]"""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...


class ModelAround:
    """A `Model` but for its `transformer`, which has another's meet its ids in a way of its own."""

    def __init__(self, model: Model) -> None:
        self.config: Any = model.config
        self.lm_head = model.lm_head
        self._model = model

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def dtype(self) -> torch.dtype:
        return self._model.dtype


def last_hidden_state(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """What `model` gives for `ids[B, T]` before its head, [B, T, C]; no keys and values are kept."""
    alone = {"use_cache": False, "output_attentions": False, "output_hidden_states": False}
    output = model.transformer(to_device(ids, model.device), **alone, return_dict=True)
    state: torch.Tensor = output.last_hidden_state
    return state


@torch.inference_mode()
def score(
    models: Sequence[Model],
    corpus: Corpus,
    progress: Progress,
    *,
    names: Sequence[str] = (),
    journal: Journal | None = None,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> Accumulator:
    """Score every window of `corpus` with each of `models`, side by side; the first is the reference.

    Memory does not grow with the number of tokens: one batch of hidden states a model, a few pieces of logits, and the
    accumulator. Batches in `journal` are not scored again. Each process of the group scores its share of the batches,
    and all return the whole.

    Raises RequestError for tokens outside a model's vocabulary, CheckpointError, with the model's name, for losses that
    are not finite, OutputError where the journal cannot be written.
    """
    check_vocabularies(models, corpus)
    limits, accumulator = batch_limits(models[0].device), Accumulator(corpus, len(models))
    work = list(batches(corpus.windows, limits.positions))
    resumed = journal.restore(accumulator, len(work)) if journal else set()
    mine = [number for number in range(len(work)) if number not in resumed][process_group.rank :: process_group.size]
    done = resumed if process_group.rank == 0 else set()
    try:
        with progress.task("scoring", total=sum(corpus.windows[w].scored for n in mine for w in work[n])) as advance:
            chosen = ([corpus.windows[w] for w in work[number]] for number in mine)
            for number, scores in zip(mine, score_batches(models, chosen, limits.rows, advance), strict=True):
                windows = work[number]
                _check_finite(scores, windows, corpus, names)
                accumulator.add(windows, scores)
                done.add(number)
                if journal:
                    journal.write_if_due(accumulator, done)
    except (KeyboardInterrupt, SystemExit) as error:
        if journal:
            journal.write(accumulator, done)
            if isinstance(error, KeyboardInterrupt):
                raise type(error)(
                    f"after {len(done)} of {len(work)} batches: the same command resumes from {journal.path}"
                ) from error
        raise
    _merge_all(accumulator, process_group)
    if journal and process_group.rank == 0:
        journal.write(accumulator, set(range(len(work))))
    return accumulator


def _merge_all(accumulator: Accumulator, group: ProcessGroup) -> None:
    """Merge the accumulators of the group's other processes into this one's."""
    for rank, state in enumerate(group.all_gather(accumulator.state() if group.size > 1 else None)):
        if rank != group.rank:
            accumulator.merge(Accumulator.from_state(state))


def score_batches(
    models: Sequence[Model], work: Iterable[Sequence[Window]], rows: int, advance: Callable[[float], None]
) -> Iterator[list[TokenScores]]:
    """Each model's scores of the scored tokens of each batch of windows, one after the other, on the CPU.

    On a GPU a batch's are yielded while the next batch is computed.
    """
    launched = (
        [part for scores in _score_batch(models, windows, rows, advance) for part in scores] for windows in work
    )
    fields = len(TokenScores._fields)
    for parts in on_host(launched):
        yield [TokenScores(*parts[start : start + fields]) for start in range(0, len(parts), fields)]


def _score_batch(
    models: Sequence[Model], windows: Sequence[Window], rows: int, advance: Callable[[float], None]
) -> list[TokenScores]:
    """Each model's scores of the scored tokens of `windows`, one after the other, where the first model computes."""
    ids, scored, targets, _ = pad_windows(windows)
    places = scored.flatten().nonzero()[:, 0]  # counted on the CPU: to count them on a GPU is to wait for it
    ids, places, targets = (to_device(tensor, models[0].device) for tensor in (ids, places, targets))
    hidden = [last_hidden_state(model, ids) for model in models]  # [B, T, C]
    hidden = [h.flatten(0, 1).index_select(0, to_device(places, h.device)) for h in hidden]  # [N, C]
    pieces: list[list[TokenScores]] = [[] for _ in models]
    for start in range(0, len(targets), rows):
        piece = slice(start, start + rows)
        logits = (model.lm_head(h[piece]) for model, h in zip(models, hidden, strict=True))
        for collected, scores in zip(pieces, score_tokens(logits, targets[piece]), strict=True):
            collected.append(scores)
        advance(len(targets[piece]))
    return [TokenScores(*map(torch.cat, zip(*collected, strict=True))) for collected in pieces]


def batches(windows: Sequence[Window], tokens: int) -> Iterator[list[int]]:
    """Numbers of windows, longest first, in batches of at most `tokens` positions (or of one window)."""
    batch: list[int] = []
    width = 0
    for number in sorted(range(len(windows)), key=lambda number: -len(windows[number].ids)):
        if batch and (len(batch) + 1) * width > tokens:
            yield batch
            batch = []
        width = width if batch else len(windows[number].ids)
        batch.append(number)
    if batch:
        yield batch


def pad_windows(windows: Sequence[Window]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids[B, T], scored[B, T] (bool: this position's prediction is scored), and for these targets[N] and units[N].

    Shorter windows are padded on the right, where no earlier position of a causal model attends.
    """
    width = max(len(window.ids) for window in windows) - 1
    ids = torch.zeros(len(windows), width, dtype=torch.int64)
    scored = torch.zeros(len(windows), width, dtype=torch.bool)
    for row, window in enumerate(windows):
        length = len(window.ids) - 1
        ids[row, :length] = window.ids[:-1]
        scored[row, length - window.scored : length] = True
    targets = torch.cat([window.ids[len(window.ids) - window.scored :].long() for window in windows])
    units = torch.tensor([window.unit for window in windows])
    return ids, scored, targets, units.repeat_interleave(torch.tensor([window.scored for window in windows]))


def score_tokens(logits: Iterator[torch.Tensor], targets: torch.Tensor) -> Iterator[TokenScores]:
    """Each model's scores of the tokens `targets`[N] by its logits[N, V]; the first model is the reference.

    KL = sum p (x - y) - (log Z_x - log Z_y): the logits' differences are formed before anything is rounded. A token's
    divergence is then right to about 1e-7 nats, without bias; from float32 log-probabilities it would be to 4e-7.
    """
    reference = next(logits).float()
    targets = targets.to(reference.device)
    log_z, p = _softmax(reference)
    yield _token_scores(reference, log_z, targets, torch.zeros_like(log_z))
    for other in logits:
        y = other.to(reference.device, torch.float32)
        other_log_z, _ = _softmax(y)
        kl = (p * (reference - y)).sum(-1).double() - (log_z - other_log_z)
        yield _token_scores(y, other_log_z, targets, kl)


def _token_scores(logits: torch.Tensor, log_z: torch.Tensor, targets: torch.Tensor, kl: torch.Tensor) -> TokenScores:
    top = logits.topk(min(TOP_TOKENS, logits.shape[-1]))
    nats = log_z - logits.gather(-1, targets[:, None])[:, 0].double()
    hit = (top.indices[:, 0] == targets).double()
    return TokenScores(nats, kl, top.indices.double(), (top.values.double() - log_z[:, None]).exp(), hit)


def _softmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log of the normalizer, float64[N], and the probabilities, float32[N, V], of float32 logits."""
    maximum = logits.amax(-1, keepdim=True)
    p = (logits - maximum).exp_()
    z = p.sum(-1, keepdim=True)
    return (z.double().log() + maximum.double())[:, 0], p.div_(z)


def check_vocabularies(models: Sequence[Model], corpus: Corpus) -> None:
    sizes = [int(model.config.vocab_size) for model in models]
    if len(set(sizes)) > 1:
        raise RequestError(f"models of different vocabularies cannot be compared: {', '.join(map(str, sizes))} tokens")
    largest = max((int(window.ids.max()) for window in corpus.windows), default=0)
    if largest >= sizes[0]:
        raise RequestError(
            f"the tokenizer gives token {largest}, but the model knows {sizes[0]} tokens: "
            "is it the model's own tokenizer?"
        )


def _check_finite(scores: list[TokenScores], windows: list[int], corpus: Corpus, names: Sequence[str]) -> None:
    for number, model in enumerate(scores):
        bad = (~torch.isfinite(model.nats + model.kl)).nonzero()
        if len(bad):
            scored = torch.tensor([corpus.windows[w].scored for w in windows]).cumsum(0)
            window = windows[int(torch.searchsorted(scored, bad[0], right=True))]
            unit = corpus.units[corpus.windows[window].unit]
            whose = f"{names[number]}'s" if names else "the"
            raise CheckpointError(
                f"{whose} loss on {unit.subset}, {unit.id}, is not a finite number: "
                "the weights are damaged, or overflow in half precision (try float32)"
            )
