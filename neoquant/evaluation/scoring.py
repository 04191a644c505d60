"""The one loop that runs models: every model reads the same windows, and each scored token is added to its unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from neoquant.errors import CheckpointError, RequestError
from neoquant.evaluation.corpus import Corpus, Window
from neoquant.progress import Progress


class Pace(NamedTuple):
    """How much is held at once. A CPU is fastest with what stays in its cache, a GPU with large pieces."""

    positions: int  # read in one batch (or one window, if that is longer)
    rows: int  # of logits, for each of two models


CPU_PACE = Pace(positions=1024, rows=128)
GPU_PACE = Pace(positions=16384, rows=1024)


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


@dataclass(frozen=True)
class Sums:
    """What was added up over the scored tokens of each unit: float64[units] on the CPU."""

    nats: torch.Tensor  # -log p(token)
    kl: torch.Tensor  # KL(reference || this model), nats
    agreed: torch.Tensor  # tokens where the likeliest token is the reference's


@torch.inference_mode()
def score(models: Sequence[Model], corpus: Corpus, progress: Progress) -> list[Sums]:
    """Score every window of `corpus` with each of `models`, side by side; the first is the reference.

    One batch of hidden states a model and a few pieces of logits are held, whatever the numbers of models and tokens.
    Raises RequestError for tokens outside a model's vocabulary, CheckpointError for logits that are not finite.
    """
    check_vocabularies(models, corpus)
    pace = CPU_PACE if models[0].device.type == "cpu" else GPU_PACE
    totals = [[torch.zeros(len(corpus.units), dtype=torch.float64) for _ in range(3)] for _ in models]
    with progress.task("scoring", total=corpus.tokens) as advance:
        for windows in batches(corpus.windows, pace.positions):
            ids, where, targets, units = stacked(windows)
            hidden = [model.transformer(ids.to(model.device)).last_hidden_state for model in models]  # [B, T, C]
            hidden = [h[where.to(h.device)] for h in hidden]  # [N, C]
            for start in range(0, len(targets), pace.rows):
                piece = slice(start, start + pace.rows)
                logits = (model.lm_head(h[piece]) for model, h in zip(models, hidden, strict=True))
                for sums, added in zip(totals, measures(logits, targets[piece]), strict=True):
                    for total, amount in zip(sums, added, strict=True):
                        total.index_add_(0, units[piece], amount.cpu())
                advance(len(targets[piece]))
    results = [Sums(*sums) for sums in totals]
    _check_finite(results, corpus)
    return results


def batches(windows: Sequence[Window], tokens: int) -> Iterator[list[Window]]:
    """The windows, longest first, in batches of at most `tokens` positions (or of one window)."""
    batch: list[Window] = []
    for window in sorted(windows, key=lambda window: -len(window.ids)):
        if batch and (len(batch) + 1) * len(batch[0].ids) > tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def stacked(windows: list[Window]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids[B, T], where[B, T] (bool: this position's prediction is scored), and for those targets[N], units[N].

    Shorter windows are filled up on the right, which no earlier position of a causal model sees.
    """
    width = max(len(window.ids) for window in windows) - 1
    ids = torch.zeros(len(windows), width, dtype=torch.int64)
    where = torch.zeros(len(windows), width, dtype=torch.bool)
    for row, window in enumerate(windows):
        length = len(window.ids) - 1
        ids[row, :length] = window.ids[:-1]
        where[row, length - window.scored : length] = True
    targets = torch.cat([window.ids[len(window.ids) - window.scored :].long() for window in windows])
    units = torch.tensor([window.unit for window in windows])
    return ids, where, targets, units.repeat_interleave(torch.tensor([window.scored for window in windows]))


def measures(
    logits: Iterator[torch.Tensor], targets: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each model's logits[N, V]: nats, KL from the first model's, agreement with its likeliest token; float64[N].

    KL = sum p (x - y) - (log Z_x - log Z_y): the logits' differences are formed before anything is rounded. A token's
    divergence is then right to about 1e-7 nats, without bias; from float32 log-probabilities it would be to 4e-7.
    """
    reference = next(logits).float()
    targets = targets.to(reference.device)
    top = reference.argmax(-1)
    log_z, p = _softmax(reference)
    picked = reference.gather(-1, targets[:, None])[:, 0].double()
    yield log_z - picked, torch.zeros_like(log_z), torch.ones_like(log_z)
    for other in logits:
        y = other.to(reference.device, torch.float32)
        other_log_z, _ = _softmax(y)
        picked = y.gather(-1, targets[:, None])[:, 0].double()
        kl = (p * (reference - y)).sum(-1).double() - (log_z - other_log_z)
        yield other_log_z - picked, kl, (y.argmax(-1) == top).double()


def _softmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log of the normalizer, float64[N], and the probabilities, float32[N, V], of float32 logits."""
    peak = logits.amax(-1, keepdim=True)
    p = (logits - peak).exp_()
    z = p.sum(-1, keepdim=True)
    return (z.double().log() + peak.double())[:, 0], p.div_(z)


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


def _check_finite(results: list[Sums], corpus: Corpus) -> None:
    for sums in results:
        bad = (~torch.isfinite(sums.nats)).nonzero()
        if len(bad):
            unit = corpus.units[int(bad[0])]
            raise CheckpointError(
                f"the loss on {unit.subset}, {unit.id}, is not a finite number: "
                "the weights are damaged, or overflow in half precision (try float32)"
            )
