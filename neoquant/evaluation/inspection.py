"""Where quantization cost what: each block linear's error, and what the loss makes of that layer alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neoquant.data.suite import Suite
from neoquant.errors import RequestError
from neoquant.evaluation.corpus import Corpus, Tokenizer, Window, read_corpus
from neoquant.evaluation.inspection_result import Inspection, Layer, Loss
from neoquant.evaluation.perplexity import Contestant, data_info, documents_met, environment, flattered
from neoquant.evaluation.prediction_intervals import kl_interval
from neoquant.evaluation.scoring import (
    CPU_PACE,
    GPU_PACE,
    batches,
    check_vocabularies,
    last_hidden_state,
    measures,
    stacked,
)
from neoquant.evaluation.statistics import ratio_interval
from neoquant.loading.pretrained import GPTNeoForCausalLM
from neoquant.model.gpt_neo import AttentionMasks, Block
from neoquant.model.names import BLOCK_LINEARS
from neoquant.nn.linear import QuantLinear
from neoquant.progress import SILENT, Progress

ROWS = 16


def inspect(
    base: Contestant,
    other: Contestant,
    tokenizer: Tokenizer,
    suite: Suite,
    *,
    rows: int = ROWS,
    sensitivity: bool = False,
    exclude_calibrated: bool = False,
    progress: Progress = SILENT,
) -> Inspection:
    """Compare the block linears of `other` with those of `base`, on `rows` windows spread evenly over `suite`.

    The inputs of every layer are the base model's own. With `sensitivity`, the base model also runs with each layer of
    `other` alone in place; the blocks before that layer are not run again, so a model of L blocks costs about 3 L
    passes. `exclude_calibrated` leaves out documents that a model was calibrated on; otherwise the result says how many
    `other` was. Both models must be neoquant's own, quantized or not.

    Raises RequestError for models of different shapes or `rows` below 1, and what `evaluate` raises.
    """
    started = time.perf_counter()
    if rows < 1:
        raise RequestError(f"rows is {rows}: at least 1 window is needed")
    ours, theirs = _network(base), _network(other)
    _check_shapes(ours, theirs)
    known = base.calibrated_on | other.calibrated_on if exclude_calibrated else ()
    corpus = read_corpus(suite.fitted(ours.config.max_position_embeddings), tokenizer, progress, known)
    met = documents_met(corpus, other.calibrated_on)
    check_vocabularies([ours, theirs], corpus)
    windows = _spread(corpus, rows)
    layers, together = _Walk(ours, theirs, windows, sensitivity).run(progress)
    return Inspection(
        model=other.describe,
        base=base.describe,
        suite=corpus.suite,
        data=data_info(corpus, tokenizer),
        environment=environment(ours),
        windows=len(windows),
        tokens=sum(window.scored for window in windows),
        layers=tuple(layers),
        together=together,
        calibrated_on=met,
        notes=(*corpus.notes, *flattered(other.describe.name, met, corpus), *_others(ours, theirs)),
        seconds=time.perf_counter() - started,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _network(contestant: Contestant) -> GPTNeoForCausalLM:
    if not isinstance(contestant.model, GPTNeoForCausalLM):
        raise RequestError(f"{contestant.describe.name} is a {type(contestant.model).__name__}, not neoquant's GPT-Neo")
    return contestant.model


def _check_shapes(ours: GPTNeoForCausalLM, theirs: GPTNeoForCausalLM) -> None:
    for key, what in (("num_layers", "layers"), ("hidden_size", "hidden size"), ("inner_size", "inner size")):
        a, b = getattr(ours.config, key), getattr(theirs.config, key)
        if a != b:
            raise RequestError(f"models of different shapes cannot be inspected together: {what} {a} and {b}")


def _spread(corpus: Corpus, rows: int) -> list[Window]:
    """At most `rows` windows at equal distances, each its own unit."""
    n = len(corpus.windows)
    chosen = [corpus.windows[(2 * i + 1) * n // (2 * min(rows, n))] for i in range(min(rows, n))]
    return [window._replace(unit=number) for number, window in enumerate(chosen)]


def _others(ours: GPTNeoForCausalLM, theirs: GPTNeoForCausalLM) -> list[str]:
    """A note of the tensors that differ and are no block linear's weight."""
    linears = {f"{path}.weight" for path in _paths(ours)}
    stored = dict(theirs.named_parameters())
    differing = [
        name
        for name, tensor in ours.named_parameters()
        if name not in linears and not (name in stored and torch.equal(tensor, stored[name].to(tensor)))
    ]
    shown = ", ".join(differing[:3]) + (", ..." if len(differing) > 3 else "")
    return [f"not shown, but outside the block linears differ too: {shown}"] if differing else []


def _paths(model: GPTNeoForCausalLM) -> list[str]:
    return [f"transformer.h.{number}.{name}" for number in range(len(model.transformer.h)) for name in BLOCK_LINEARS]


def weight_of(module: nn.Module) -> Tensor:
    """The weight that a plain or quantized linear stands for, float32[O, I]."""
    if isinstance(module, QuantLinear):
        return module.quantized.dequantize(torch.float32)
    assert isinstance(module, nn.Linear)
    return module.weight.detach().float()


@dataclass
class _Batch:
    """Windows on their way through the base model."""

    ids: Tensor  # int64[B, T]
    where: Tensor  # bool[B, T]: the scored positions, N in all
    targets: Tensor  # [N]
    units: Tensor  # [N], windows
    x: Tensor  # [B, T, C], what the next block reads
    masks: AttentionMasks
    last: Tensor  # [N, C], what the base model's head reads


class _Losses:
    """Sums over the scored tokens of each window: the change of -log p, and the divergence."""

    def __init__(self, windows: Sequence[Window]) -> None:
        self.tokens = torch.tensor([window.scored for window in windows], dtype=torch.float64)
        self.nats, self.kl = torch.zeros_like(self.tokens), torch.zeros_like(self.tokens)

    def add(self, units: Tensor, nats: Tensor, kl: Tensor) -> None:
        self.nats.index_add_(0, units, nats.cpu())
        self.kl.index_add_(0, units, kl.cpu())

    def loss(self) -> Loss:
        interval, divergence = ratio_interval(self.nats, self.tokens), kl_interval(self.kl, self.tokens)
        total = self.tokens.sum()
        return Loss(
            nats_per_token=float(self.nats.sum() / total),
            low=interval.low if interval else None,
            high=interval.high if interval else None,
            kl=float(self.kl.sum() / total),
            kl_low=divergence.low if divergence else None,
            kl_high=divergence.high if divergence else None,
        )


_Variant = tuple[Tensor, nn.Module, _Losses]  # hidden[N, C], the head that reads it, and where its losses add up


class _Walk:
    """Block after block through the base model with all batches."""

    def __init__(
        self, ours: GPTNeoForCausalLM, theirs: GPTNeoForCausalLM, windows: Sequence[Window], sensitivity: bool
    ) -> None:
        self.ours, self.theirs, self.windows, self.sensitivity = ours, theirs, windows, sensitivity
        self.pace = CPU_PACE if ours.device.type == "cpu" else GPU_PACE

    @torch.inference_mode()
    def run(self, progress: Progress) -> tuple[list[Layer], Loss]:
        blocks = self.ours.transformer.h
        groups = [[self.windows[n] for n in batch] for batch in batches(self.windows, self.pace.positions)]
        layers: list[Layer] = []
        together = _Losses(self.windows)
        with progress.task("inspecting", total=(1 + len(blocks)) * len(groups)) as advance:
            made = []
            for group in groups:
                made.append(self._start(group, together))
                advance(1)
            for number, block in enumerate(blocks):
                layers += self._block(number, block, made, advance)
        return layers, together.loss()

    def _start(self, group: list[Window], together: _Losses) -> _Batch:
        """A batch before the first block, and what both whole models make of it."""
        ids, where, targets, units = stacked(group)
        device, T = self.ours.device, ids.shape[1]
        ids, where = ids.to(device), where.to(device)
        base = self.ours.transformer
        last = last_hidden_state(self.ours, ids)[where]
        theirs = last_hidden_state(self.theirs, ids)[where.to(self.theirs.device)]
        x = base.wte(ids) + base.wpe(torch.arange(T, device=device))
        masks = AttentionMasks(T, T, self.ours.config.window_size, None, device)
        batch = _Batch(ids, where, targets, units, x, masks, last)
        self._score(batch, [(theirs, self.theirs.lm_head, together)])
        return batch

    def _block(
        self, number: int, block: nn.Module, made: list[_Batch], advance: Callable[[float], None]
    ) -> Iterator[Layer]:
        assert isinstance(block, Block)
        block_of_theirs = self.theirs.transformer.h[number]
        weights = {name: weight_of(block.get_submodule(name)) for name in BLOCK_LINEARS}
        quantized = {name: weight_of(block_of_theirs.get_submodule(name)).to(w.device) for name, w in weights.items()}
        errors = {name: quantized[name] - w for name, w in weights.items()}
        changed = [name for name, error in errors.items() if bool(error.any())]
        sums = {name: torch.zeros(2, dtype=torch.float64) for name in BLOCK_LINEARS}  # of the error, of the output
        losses = {name: _Losses(self.windows) for name in BLOCK_LINEARS}
        for batch in made:
            with _watched(block, weights, errors, sums, batch.where):
                after = block(batch.x, batch.masks)
            if self.sensitivity:
                variants: list[_Variant] = []
                for name in changed:
                    with _replaced(block, name, quantized[name]):
                        x = block(batch.x, batch.masks)
                    variants.append((self._rest(number, x, batch), self.ours.lm_head, losses[name]))
                self._score(batch, variants)
            batch.x = after
            advance(1)
        for name in BLOCK_LINEARS:
            module = block_of_theirs.get_submodule(name)
            error, output = sums[name].tolist()
            yield Layer(
                block=number,
                projection=name,
                attention=self.ours.config.attention_layers[number],
                shape=(weights[name].shape[0], weights[name].shape[1]),
                grid=module.grid.describe() if isinstance(module, QuantLinear) else None,
                weight_error=_ratio(float(errors[name].double().square().sum()), weights[name]),
                output_error=error / output if output else 0.0,
                loss=losses[name].loss() if self.sensitivity else None,
            )

    def _rest(self, number: int, x: Tensor, batch: _Batch) -> Tensor:
        """What the head reads, [N, C], where block `number` gave `x`."""
        for block in self.ours.transformer.h[number + 1 :]:
            x = block(x, batch.masks)
        hidden: Tensor = self.ours.transformer.ln_f(x)[batch.where]
        return hidden

    def _score(self, batch: _Batch, variants: Sequence[_Variant]) -> None:
        """Add each variant's losses over the base model's, whose logits are made once."""
        for start in range(0, len(batch.targets), self.pace.rows):
            piece = slice(start, start + self.pace.rows)
            heads = [(batch.last, self.ours.lm_head), *((hidden, head) for hidden, head, _ in variants)]
            logits = (head(hidden[piece]) for hidden, head in heads)
            results = measures(logits, batch.targets[piece])
            base, *_ = next(results)
            for (_, _, sums), (nats, kl, *_) in zip(variants, results, strict=True):
                sums.add(batch.units[piece], nats - base, kl)


def _ratio(square: float, w: Tensor) -> float:
    whole = float(w.double().square().sum())
    return square / whole if whole else 0.0


@contextmanager
def _watched(
    block: Block, weights: dict[str, Tensor], errors: dict[str, Tensor], sums: dict[str, Tensor], where: Tensor
) -> Iterator[None]:
    """While `block` runs: sums[name] += squares of (error x, weight x) over the scored positions."""

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def seen(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = given[0][where].float()
            for number, matrix in enumerate((errors[name], weights[name])):
                sums[name][number] += F.linear(x, matrix).double().square().sum().cpu()

        return seen

    hooks = [block.get_submodule(name).register_forward_pre_hook(watch(name)) for name in BLOCK_LINEARS]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _replaced(block: Block, name: str, weight: Tensor) -> Iterator[None]:
    """While inside, layer `name` of `block` multiplies with `weight`; its bias stays."""
    own = block.get_submodule(name)
    stand_in = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    dtype = next(block.ln_1.parameters()).dtype
    stand_in.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    stand_in.bias = own.bias  # type: ignore[assignment]
    block.set_submodule(name, stand_in)
    try:
        yield
    finally:
        block.set_submodule(name, own)
