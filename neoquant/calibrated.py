"""Block after block through a checkpoint with calibration rows: what calibrated quantizers give for its layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neoquant.calibration import Calibration, Walk
from neoquant.checkpoint import Checkpoint
from neoquant.errors import CheckpointError, RequestError, locate
from neoquant.model.config import GPTNeoConfig
from neoquant.model.gpt_neo import Block
from neoquant.planning import Plan, PlanRow
from neoquant.progress import Progress
from neoquant.states import States
from neoquant.tensor import QuantizedTensor

_IN_BLOCK = re.compile(r"(?:transformer\.)?h\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Quantized:
    """One block: its rows of the plan, the weights on their grids by row name, and what happened by layer."""

    rows: list[PlanRow]
    weights: dict[str, QuantizedTensor]
    reports: dict[str, Any]


def needs_calibration(planned: Plan) -> bool:
    """Whether some layer's quantizer must see the layer's inputs."""
    return any(row.quantizer is not None and row.quantizer.needs_calibration for row in planned.rows)


def require_calibration(planned: Plan, calibration: Calibration | None) -> None:
    """Raise RequestError where calibration is asked for and not given, or given for nothing, or does not fit."""
    needed = needs_calibration(planned)
    if needed and calibration is None:
        raise RequestError("gptq must see text: name some with --calibration (pile, demo, a suite or a file)")
    if calibration is None:
        return
    if not needed:
        raise RequestError("rounding to nearest sees no text: leave calibration out, or ask for the quantizer gptq")
    config = GPTNeoConfig.from_dict(dict(planned.config))
    length, largest = calibration.ids.shape[1], int(calibration.ids.max())
    if length > config.max_position_embeddings:
        raise RequestError(
            f"calibration rows of {length} tokens: the model has {config.max_position_embeddings} positions"
        )
    if largest >= config.vocab_size:
        raise RequestError(f"calibration holds token {largest}: the model's end at {config.vocab_size - 1}")


def block_of(row: PlanRow) -> int | None:
    """The number of the block that a tensor belongs to."""
    found = _IN_BLOCK.fullmatch(row.name)
    return int(found[1]) if found else None


def quantize_blocks(
    checkpoint: Checkpoint, planned: Plan, states: States, first: int, progress: Progress, keep_inner: bool = False
) -> Iterator[Quantized]:
    """Each block from the `first` on, the later ones seeing what the earlier ones give once they are quantized.

    One block is in memory at a time, in float32, beside the hidden states of the calibration rows: `states`, as the
    first block sees them, and after each block as the next one does. `keep_inner` as for `Walk`.
    """
    config = GPTNeoConfig.from_dict(checkpoint.config)
    walk = Walk(states, config.window_size, keep_inner)
    numbers = {row.name: block_of(row) for row in planned.rows}
    with progress.task("calibrating", total=config.num_layers) as advance:
        advance(first)
        for number in range(first, config.num_layers):
            rows = [row for row in planned.rows if numbers[row.name] == number]
            yield _quantize_block(checkpoint, rows, config, number, walk)
            advance(1)


def _quantize_block(
    checkpoint: Checkpoint, rows: list[PlanRow], config: GPTNeoConfig, number: int, walk: Walk
) -> Quantized:
    by_name = {_local(row): row for row in rows}
    chosen = {name: row.quantizer for name, row in by_name.items() if row.quantizer is not None}
    weights: dict[str, QuantizedTensor] = {}
    reports: dict[str, Any] = {}

    def observe(names: tuple[str, ...], inputs: Callable[[], Iterator[Tensor]], columns: int) -> Any:
        seeing = [chosen[key] for name in names if (key := f"{name}.weight") in chosen]
        seen = next((seen for quantizer in seeing if (seen := quantizer.observer(columns)) is not None), None)
        if seen is not None:
            for piece in inputs():
                seen.add(piece)
        return seen

    def rounded(name: str, w: Tensor, seen: Any, outputs: Tensor | None) -> Tensor:
        row = by_name[f"{name}.weight"]
        if row.grid is None or row.quantizer is None:
            return w
        with locate(row.name):
            q, report = row.quantizer.run(w.to(row.dtype), row.grid, seen, outputs)
        if report is not None:
            reports[row.layer] = report
        weights[row.name] = q
        return q.dequantize(torch.float32)

    weigh = any(quantizer.weighs_outputs for quantizer in chosen.values())
    walk.through(_read_block(checkpoint, by_name, config, number), observe, rounded, weigh)
    return Quantized(rows, weights, reports)


def _local(row: PlanRow) -> str:
    found = _IN_BLOCK.fullmatch(row.name)
    assert found is not None
    return found[2]


def _read_block(checkpoint: Checkpoint, by_name: dict[str, PlanRow], config: GPTNeoConfig, number: int) -> Block:
    with torch.device("meta"):
        block = Block(config, number, "sdpa")
    for name, slot in list(block.named_parameters()):
        if name not in by_name:
            raise CheckpointError(f"block {number} lacks {name}")
        tensor = checkpoint.read(by_name[name].name).float()
        if tensor.shape != slot.shape or not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{by_name[name].name} is {list(tensor.shape)}, not {list(slot.shape)}, or not finite"
            )
        path, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))
    return block.eval()


def embed(checkpoint: Checkpoint, ids: Tensor, states: States) -> None:
    """Let `states` be the rows as the first block sees them."""
    names = {name.removeprefix("transformer."): name for name in checkpoint.headers}
    head = names.get("wte.weight", names.get("lm_head.weight"))
    if head is None or "wpe.weight" not in names:
        raise CheckpointError("lacks its embeddings")
    positions = checkpoint.read(names["wpe.weight"])[: ids.shape[1]].float()
    table = checkpoint.view(head)
    states.replace(table[piece].float().add_(positions) for piece in torch.split(ids, states.batch))
    checkpoint.forget(head)
