"""The error of each quantized block linear, and the loss with that layer alone quantized (its sensitivity)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neoquant.data.suite import Suite
from neoquant.errors import RequestError
from neoquant.evaluation.corpus import Corpus, TokenizerLike, Window, read_corpus
from neoquant.evaluation.inspection_result import Inspection, Layer, Loss
from neoquant.evaluation.perplexity import (
    EvaluatedModel,
    contaminated_documents,
    contamination_notes,
    data_info,
    environment,
)
from neoquant.evaluation.prediction_intervals import kl_interval
from neoquant.evaluation.scoring import (
    batch_limits,
    batches,
    check_vocabularies,
    last_hidden_state,
    pad_windows,
    score_tokens,
)
from neoquant.evaluation.statistics import ratio_interval
from neoquant.loading.pretrained import GPTNeoForCausalLM
from neoquant.model.gpt_neo import AttentionMasks, Block
from neoquant.model.names import BLOCK_LINEARS
from neoquant.model.transfers import on_host, to_device
from neoquant.nn.linear import QuantLinear
from neoquant.progress import SILENT, Progress

ROWS = 16


def inspect(
    base: EvaluatedModel,
    other: EvaluatedModel,
    tokenizer: TokenizerLike,
    suite: Suite,
    *,
    rows: int = ROWS,
    sensitivity: bool = False,
    exclude_calibrated: bool = False,
    progress: Progress = SILENT,
) -> Inspection:
    """Compare the block linears of `other` with those of `base`, on `rows` windows spread evenly over `suite`.

    Every layer reads the base model's own inputs. `sensitivity` also scores the base model with each layer of `other`
    alone in place, which costs about 3 L passes for L blocks. `exclude_calibrated` leaves out documents that a model
    was calibrated on; otherwise the result counts those of `other`. Both models must be neoquant's own.

    Raises RequestError for models of different shapes or `rows` below 1, and what `evaluate` raises.
    """
    started = time.perf_counter()
    if rows < 1:
        raise RequestError(f"rows is {rows}: at least 1 window is needed")
    network, quantized = _networks(base, other)
    known = base.calibrated_on | other.calibrated_on if exclude_calibrated else ()
    corpus = read_corpus(suite.fitted(network.config.max_position_embeddings), tokenizer, progress, known)
    check_vocabularies([network, quantized], corpus)
    windows = _evenly_spaced(corpus, rows)
    layers, together = _Inspector(network, quantized, windows, sensitivity).run(progress)
    contaminated = contaminated_documents(corpus, other.calibrated_on)
    notes = contamination_notes(other.describe.name, contaminated, corpus)
    return Inspection(
        model=other.describe,
        base=base.describe,
        suite=corpus.suite,
        data=data_info(corpus, tokenizer),
        environment=environment(network),
        windows=len(windows),
        tokens=sum(window.scored for window in windows),
        layers=tuple(layers),
        together=together,
        calibrated_on=contaminated,
        notes=(*corpus.notes, *notes, *_differences_elsewhere(network, quantized)),
        seconds=time.perf_counter() - started,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _networks(base: EvaluatedModel, other: EvaluatedModel) -> list[GPTNeoForCausalLM]:
    networks = []
    for model, describe, _ in (base, other):
        if not isinstance(model, GPTNeoForCausalLM):
            raise RequestError(f"{describe.name} is of type {type(model).__name__}, not neoquant's GPT-Neo")
        networks.append(model)
    for key, what in (("num_layers", "layers"), ("hidden_size", "hidden size"), ("inner_size", "inner size")):
        a, b = (getattr(network.config, key) for network in networks)
        if a != b:
            raise RequestError(f"models of different shapes cannot be inspected together: {what} {a} and {b}")
    return networks


def _evenly_spaced(corpus: Corpus, rows: int) -> list[Window]:
    """At most `rows` windows at equal distances, each its own unit."""
    n = len(corpus.windows)
    chosen = [corpus.windows[(2 * i + 1) * n // (2 * min(rows, n))] for i in range(min(rows, n))]
    return [window._replace(unit=number) for number, window in enumerate(chosen)]


def _differences_elsewhere(base: GPTNeoForCausalLM, other: GPTNeoForCausalLM) -> list[str]:
    """A note of the tensors that differ and are not a block linear's weight."""
    linears = {
        f"transformer.h.{number}.{name}.weight" for number in range(len(base.transformer.h)) for name in BLOCK_LINEARS
    }
    others = dict(other.named_parameters())
    differing = [
        name
        for name, tensor in base.named_parameters()
        if name not in linears and not (name in others and torch.equal(tensor, others[name].to(tensor)))
    ]
    shown = ", ".join(differing[:3]) + (", ..." if len(differing) > 3 else "")
    return [f"not shown, but outside the blocks' linear layers differ too: {shown}"] if differing else []


def weight_of(module: nn.Module) -> Tensor:
    """The weight that a plain or quantized linear stands for, float32[O, I]."""
    if isinstance(module, QuantLinear):
        return module.quantized.dequantize(torch.float32)
    assert isinstance(module, nn.Linear)
    return module.weight.detach().float()


@dataclass
class _Batch:
    """Windows, and their hidden states in the base model."""

    ids: Tensor  # int64[B, T]
    places: Tensor  # int64[N]: the scored positions, among all B T
    targets: Tensor  # [N]
    units: Tensor  # [N], windows
    x: Tensor  # [B, T, C], the input of the next block
    masks: AttentionMasks
    last: Tensor  # [N, C], the input of the base model's head


class _Losses:
    """Sums over the scored tokens of each window: the change of -log p, and the divergence."""

    def __init__(self, windows: Sequence[Window]) -> None:
        self.tokens = torch.tensor([window.scored for window in windows], dtype=torch.float64)
        self.nats, self.kl = torch.zeros_like(self.tokens), torch.zeros_like(self.tokens)

    def add(self, units: Tensor, nats: Tensor, kl: Tensor) -> None:
        self.nats.index_add_(0, units, nats)
        self.kl.index_add_(0, units, kl)

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


_Variant = tuple[Tensor, nn.Module, _Losses]  # hidden[N, C], the head that reads it, and the sums of its losses


class _BlockWeights:
    """The weights of one block's linears in both models, and what is summed for each, by the layer's name."""

    def __init__(self, base: Block, other: Block, windows: Sequence[Window]) -> None:
        self.base = {name: weight_of(base.get_submodule(name)) for name in BLOCK_LINEARS}
        self.other = {name: weight_of(other.get_submodule(name)).to(w.device) for name, w in self.base.items()}
        self.errors = {name: self.other[name] - w for name, w in self.base.items()}
        self.changed = [name for name, error in self.errors.items() if bool(error.any())]
        self.squares = {  # of error x, weight x
            name: torch.zeros(2, dtype=torch.float64, device=w.device) for name, w in self.base.items()
        }
        self.losses = {name: _Losses(windows) for name in BLOCK_LINEARS}

    def weight_error(self, name: str) -> float:
        whole = float(self.base[name].double().square().sum())
        return float(self.errors[name].double().square().sum()) / whole if whole else 0.0

    def output_error(self, name: str) -> float:
        error, output = self.squares[name].tolist()
        return error / output if output else 0.0


class _Inspector:
    """Runs all batches through the base model, one block after the other."""

    def __init__(
        self, base: GPTNeoForCausalLM, other: GPTNeoForCausalLM, windows: Sequence[Window], sensitivity: bool
    ) -> None:
        self.base, self.other, self.windows, self.sensitivity = base, other, windows, sensitivity
        self.limits = batch_limits(base.device)

    @torch.inference_mode()
    def run(self, progress: Progress) -> tuple[list[Layer], Loss]:
        """Each block linear's figures, and the loss with all of them quantized."""
        blocks = self.base.transformer.h
        groups = [[self.windows[n] for n in batch] for batch in batches(self.windows, self.limits.positions)]
        layers: list[Layer] = []
        together = _Losses(self.windows)
        with progress.task("inspecting", total=(1 + len(blocks)) * len(groups)) as advance:
            embedded = []
            for group in groups:
                embedded.append(self._embed(group, together))
                advance(1)
            for number in range(len(blocks)):
                layers += self._inspect_block(number, embedded, advance)
        return layers, together.loss()

    def _embed(self, group: list[Window], together: _Losses) -> _Batch:
        """A batch before the first block; adds the whole other model's losses to `together`."""
        ids, scored, targets, units = pad_windows(group)
        device, T = self.base.device, ids.shape[1]
        places = scored.flatten().nonzero()[:, 0]  # counted on the CPU: to count them on a GPU is to wait for it
        ids, places, targets = (to_device(tensor, device) for tensor in (ids, places, targets))
        network = self.base.transformer
        last, others = (_chosen(last_hidden_state(model, ids), places) for model in (self.base, self.other))
        x = network.wte(ids) + network.wpe(torch.arange(T, device=device))
        masks = AttentionMasks(T, T, self.base.config.window_size, None, device)
        batch = _Batch(ids, places, targets, units, x, masks, last)
        self._score(batch, [(others, self.other.lm_head, together)])
        return batch

    def _inspect_block(self, number: int, made: list[_Batch], advance: Callable[[float], None]) -> Iterator[Layer]:
        block, other = self.base.transformer.h[number], self.other.transformer.h[number]
        assert isinstance(block, Block) and isinstance(other, Block)
        weights = _BlockWeights(block, other, self.windows)
        for batch in made:
            with _output_errors_summed(block, weights, batch.places):
                x = block(batch.x, batch.masks)
            if self.sensitivity:
                self._score_single_layers(number, batch, weights)
            batch.x = x
            advance(1)
        for name in BLOCK_LINEARS:
            module = other.get_submodule(name)
            yield Layer(
                block=number,
                projection=name,
                attention=self.base.config.attention_layers[number],
                shape=(weights.base[name].shape[0], weights.base[name].shape[1]),
                grid=module.grid.describe() if isinstance(module, QuantLinear) else None,
                weight_error=weights.weight_error(name),
                output_error=weights.output_error(name),
                loss=weights.losses[name].loss() if self.sensitivity else None,
            )

    def _score_single_layers(self, number: int, batch: _Batch, weights: _BlockWeights) -> None:
        """Add the losses of the base model with one layer of block `number` quantized, for each layer that differs."""
        block = self.base.transformer.h[number]
        assert isinstance(block, Block)
        variants: list[_Variant] = []
        for name in weights.changed:
            with _replaced(block, name, weights.other[name]):
                x = block(batch.x, batch.masks)
            for later in self.base.transformer.h[number + 1 :]:
                x = later(x, batch.masks)
            hidden = _chosen(self.base.transformer.ln_f(x), batch.places)
            variants.append((hidden, self.base.lm_head, weights.losses[name]))
        self._score(batch, variants)

    def _score(self, batch: _Batch, variants: Sequence[_Variant]) -> None:
        """Add each variant's losses above the base model's, on a GPU while the next ones are computed."""
        pieces = [slice(start, start + self.limits.rows) for start in range(0, len(batch.targets), self.limits.rows)]
        found = on_host(self._differences(batch, variants, pieces))
        for (piece, (_, _, losses)), (nats, kl) in zip(product(pieces, variants), found, strict=True):
            losses.add(batch.units[piece], nats, kl)

    def _differences(
        self, batch: _Batch, variants: Sequence[_Variant], pieces: Sequence[slice]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each piece, for each variant: KL behind its losses above the base model's, whose logits are made once."""
        for piece in pieces:
            heads = [(batch.last, self.base.lm_head), *((hidden, head) for hidden, head, _ in variants)]
            logits = (head(hidden[piece]) for hidden, head in heads)
            scores = score_tokens(logits, batch.targets[piece])
            base = next(scores)
            yield from ((score.nats - base.nats, score.kl) for score in scores)


@contextmanager
def _output_errors_summed(block: Block, weights: _BlockWeights, places: Tensor) -> Iterator[None]:
    """While `block` runs: add the squares of (error x, weight x) over the scored positions to `weights.squares`."""

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = _chosen(inputs[0], places).float()
            for number, matrix in enumerate((weights.errors[name], weights.base[name])):
                weights.squares[name][number] += F.linear(x, matrix).double().square().sum()

        return hook

    hooks = [block.get_submodule(name).register_forward_pre_hook(hook_of(name)) for name in BLOCK_LINEARS]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _chosen(states: Tensor, places: Tensor) -> Tensor:
    """states[B, T, C] at places[N] of all B T: [N, C]."""
    return states.flatten(0, 1).index_select(0, to_device(places, states.device))


@contextmanager
def _replaced(block: Block, name: str, weight: Tensor) -> Iterator[None]:
    """Inside the context, layer `name` of `block` multiplies with `weight`; its bias stays."""
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
