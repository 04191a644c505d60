"""Sequential quantization (GPTQ's way through a model): block after block, each layer on the inputs that it will see.

Calibration samples pass through the blocks as they become once they are quantized, one block in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from neoquant.calibration.attention_hessian import attention_hessians
from neoquant.calibration.block_forward import BlockForward, Stage
from neoquant.calibration.dataset import Calibration
from neoquant.calibration.hidden_states import HiddenStates
from neoquant.calibration.missing_output import MissingOutput, UnquantizedBlock
from neoquant.calibration.share import Share
from neoquant.checkpoint import Checkpoint
from neoquant.distributed import ProcessGroup
from neoquant.errors import CheckpointError, RequestError, locate
from neoquant.model.config import GPTNeoConfig
from neoquant.model.gpt_neo import Block
from neoquant.model.names import BASE_PREFIX, SHARED_INPUTS
from neoquant.progress import Progress
from neoquant.quantization.plan import Plan, PlanRow
from neoquant.quantizers import Hessian, Quantizer, calibrated_quantizers
from neoquant.quantizers.base import LayerReport
from neoquant.sizes import plural
from neoquant.tensor import QuantizedTensor

ATTENTION_INPUTS = frozenset(SHARED_INPUTS[0])

OutputHessians = Callable[[int], dict[str, Tensor]]
"""Number of a block -> by a layer's name in it, K[heads, D, D]."""

Made = tuple[QuantizedTensor, LayerReport | None]
"""A quantized weight, and its report."""


class UnquantizedStates(Protocol):
    """Hidden states of the unquantized model, of the first calibration samples at least."""

    def __call__(self, number: int, behind_attention: bool = False) -> HiddenStates:
        """What a block sees, or what is behind its attention."""


@dataclass(frozen=True)
class QuantizedBlock:
    """One block: its rows of the plan, the quantized weights by row name, and a report of each by layer."""

    rows: list[PlanRow]
    weights: dict[str, QuantizedTensor]
    reports: dict[str, Any]


def needs_calibration(plan: Plan) -> bool:
    """Whether some layer's quantizer must see the layer's inputs."""
    return any(row.needs_calibration for row in plan.rows)


def needing_calibration(plan: Plan) -> str:
    """The names of the plan's quantizers that need calibration; empty if none does."""
    return " and ".join(sorted({row.quantizer.name for row in plan.rows if row.quantizer and row.needs_calibration}))


def require_calibration(plan: Plan, calibration: Calibration | None) -> None:
    """Raise RequestError where calibration is asked for and not given, or given for nothing, or does not fit."""
    needed = needing_calibration(plan)
    if needed and calibration is None:
        raise RequestError(
            f"{needed} needs calibration samples: name their text with --calibration (pile, demo, a suite or a file)"
        )
    if calibration is None:
        return
    if not needed:
        given = {row.target.quantizer.name for row in plan.rows if row.target is not None}
        raise RequestError(
            f"{' and '.join(sorted(given))} needs no calibration: leave it out, or "
            f"ask for {' or '.join(calibrated_quantizers())}"
        )
    require_samples_fit(calibration, GPTNeoConfig.from_dict(dict(plan.config)))


def require_samples_fit(calibration: Calibration, config: GPTNeoConfig) -> None:
    """Raise RequestError where samples are longer than the model's context, or hold tokens that it does not have."""
    length, largest = calibration.ids.shape[1], int(calibration.ids.max())
    if length > config.max_position_embeddings:
        raise RequestError(
            f"calibration rows of {plural(length, 'token')}: the model has "
            f"{plural(config.max_position_embeddings, 'position')}"
        )
    if largest >= config.vocab_size:
        raise RequestError(f"calibration holds token {largest}: the model's end at {config.vocab_size - 1}")


@dataclass(frozen=True)
class Calibrating:
    """What goes through the model while its blocks are quantized.

    hidden           this process's calibration samples as the next block sees them
    share            which of all samples they are
    keep_inner       as for `BlockForward`
    output_hessians  those of the model's loss, where some layer is rounded for it
    unquantized      the samples in the unquantized model, where some layer is corrected by it
    """

    hidden: HiddenStates
    share: Share
    keep_inner: bool = False
    output_hessians: OutputHessians | None = None
    unquantized: UnquantizedStates | None = None


class Seen(NamedTuple):
    """What calibration says of a layer, as `Quantizer.quantize` takes it."""

    hessian: Hessian | None
    output_hessian: Tensor | None
    missing: Tensor | None


class SeenByStage(NamedTuple):
    """What calibration says of the layers of a stage."""

    hessian: Hessian | None
    output_hessians: dict[str, Tensor]
    missing: MissingOutput | None

    def of(self, name: str) -> Seen:
        """Of a layer whose weight is as it was."""
        lacking = None if self.missing is None else self.missing.of(name)
        return Seen(self.hessian, self.output_hessians.get(name), lacking)


def quantize_blocks(
    checkpoint: Checkpoint, plan: Plan, samples: Calibrating, first: int, progress: Progress
) -> Iterator[QuantizedBlock]:
    """Each block from number `first` on, in every process that shares the samples.

    Args:
        checkpoint: read one block at a time, in float32.
        plan: what becomes of every tensor.
        samples: as block `first` sees them, and after each block as the next one does.
        first: the number of the first block to quantize.
        progress: told of every block.
    """
    config = GPTNeoConfig.from_dict(checkpoint.config)
    forward = BlockForward(samples.hidden, config.window_size, samples.keep_inner)
    after: HiddenStates | None = None
    with progress.task("calibrating", total=config.num_layers) as advance:
        advance(first)
        for number in range(first, config.num_layers):
            rows = [row for row in plan.rows if row.block == number]
            for_loss = {} if samples.output_hessians is None else samples.output_hessians(number)
            block = read_block(checkpoint, rows, config, number).to(samples.hidden.device)
            unquantized = None
            if samples.unquantized is not None:
                before = samples.unquantized(number) if after is None else after
                behind, after = samples.unquantized(number, True), samples.unquantized(number + 1)
                unquantized = UnquantizedBlock(block, before, behind, after)
            yield _quantize_block(block, rows, forward, unquantized, for_loss, samples.share)
            if unquantized is not None:
                unquantized.close()
            advance(1)


def _quantize_block(
    block: Block,
    rows: list[PlanRow],
    forward: BlockForward,
    unquantized: UnquantizedBlock | None,
    for_loss: dict[str, Tensor],
    share: Share,
) -> QuantizedBlock:
    """Quantize the layers of `block`, which is changed, and leave in `forward` the hidden states behind it.

    `for_loss` are the output-side Hessians, [heads, D, D], of layers that are rounded for the model's loss.
    """
    result = QuantizedBlock(rows, {}, {})
    targets = {row.name_in_block: row for row in rows if row.target is not None}
    output_hessians = {name: K.to(forward.hidden.device) for name, K in for_loss.items()}
    for stage in forward.stages(block):
        chosen = {name: row for name in stage.linears if (row := targets.get(f"{name}.weight")) is not None}
        quantizers = [row.target.quantizer for row in chosen.values() if row.target is not None]
        for_attention = any(each.uses_output_hessian and not each.needs_gradients for each in quantizers)
        if stage.linears.keys() >= ATTENTION_INPUTS and for_attention:
            output_hessians = _attention_hessians(block, stage, share) | output_hessians
        missing = None
        if unquantized is not None and any(each.needs_reference for each in quantizers):
            missing = MissingOutput(stage, forward.hidden, unquantized)
        hessian = _observe(stage, quantizers, stage.inputs if missing is None else missing.gather, share.group)
        if missing is not None:
            missing.add_up(share.group.add_up)
        seen = SeenByStage(hessian, output_hessians, missing)
        for name, made in _made_by_all(stage, chosen, seen, share.group):
            _put_in_place(stage.linears[name], chosen[name], made, result)
    return result


def _made_by_all(
    stage: Stage, chosen: dict[str, PlanRow], seen: SeenByStage, group: ProcessGroup
) -> Iterator[tuple[str, Made]]:
    """Layers of a stage with what is made of each, by the processes in turn."""
    own = [name for number, name in enumerate(chosen) if number % group.size == group.rank]
    made = {name: _quantized(stage.linears[name], chosen[name], seen.of(name)) for name in own}
    for number, name in enumerate(chosen):
        if group.size == 1:
            yield name, made[name]
            continue
        given = (made[name][0].to(torch.device("cpu")), made[name][1]) if name in made else None
        yield name, group.broadcast(given, number % group.size)


def _attention_hessians(block: Block, stage: Stage, share: Share) -> dict[str, Tensor]:
    """The output-side Hessians of queries, keys and values by their names in the block."""
    found = attention_hessians(block.attn.attention, stage.inputs(), share.rows, share.numbers)
    for name in ("q_proj", "k_proj"):  # that of v_proj is one of weights
        found[name] = share.group.add_up(found[name])
    return {f"attn.attention.{name}": K for name, K in found.items()}


def _observe(
    stage: Stage, quantizers: list[Quantizer], inputs: Callable[[], Iterator[Tensor]], group: ProcessGroup
) -> Hessian | None:
    """What the quantizers of a stage's layers need to know about their common inputs, in all processes."""
    device = next(iter(stage.linears.values())).weight.device
    observers = (quantizer.observer(stage.in_features, device) for quantizer in quantizers)
    hessian = next((observer for observer in observers if observer is not None), None)
    if hessian is not None:
        for batch in inputs():
            hessian.add(batch, checked=False)
        hessian.require_finite()
        if group.size > 1:
            hessian.add_up(group.add_up)
    return hessian


def _quantized(linear: nn.Linear, row: PlanRow, seen: Seen) -> Made:
    """One layer, quantized as its row says, and the report."""
    assert row.target is not None
    quantizer, grid = row.target.quantizer, row.target.grid
    with locate(row.name):
        weight = linear.weight.detach().to(row.rounded_from)
        return quantizer.quantize_with_report(weight, grid, *seen)


def _put_in_place(linear: nn.Linear, row: PlanRow, made: Made, result: QuantizedBlock) -> None:
    """Note what was made of a layer, in whichever process; its weight becomes what the quantized one gives."""
    q, report = made
    result.weights[row.name] = q.to(torch.device("cpu"))
    if report is not None:
        result.reports[row.layer] = report
    linear.weight = nn.Parameter(q.to(linear.weight.device).dequantize(torch.float32), requires_grad=False)


def read_block(checkpoint: Checkpoint, rows: list[PlanRow], config: GPTNeoConfig, number: int) -> Block:
    """One block of the checkpoint, in float32; `rows` are the plan's of that block."""
    names = {row.name_in_block: row.name for row in rows}
    with torch.device("meta"):
        block = Block(config, number, "sdpa")
    for name, slot in list(block.named_parameters()):
        if name not in names:
            raise CheckpointError(f"block {number} lacks {name}")
        tensor = checkpoint.read(names[name]).float()
        if tensor.shape != slot.shape or not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{names[name]} is {list(tensor.shape)}, not {list(slot.shape)}, or not finite")
        path, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))
    return block.eval()


def embed(checkpoint: Checkpoint, ids: Tensor, hidden: HiddenStates) -> None:
    """Let `hidden` be the calibration samples `ids`[R, T] as the first block sees them."""
    names = {name.removeprefix(BASE_PREFIX): name for name in checkpoint.headers}
    head = names.get("wte.weight", names.get("lm_head.weight"))
    if head is None or "wpe.weight" not in names:
        raise CheckpointError("lacks its embeddings")
    positions = checkpoint.read(names["wpe.weight"])[: ids.shape[1]].float()
    table = checkpoint.view(head)
    pieces = torch.split(ids, hidden.batch) if len(ids) else ()
    hidden.replace(table[batch].float().add_(positions) for batch in pieces)
    checkpoint.forget(head)
