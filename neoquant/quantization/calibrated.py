"""A calibrated run: block after block through the model, each finished block kept on disk, so that the run resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from neoquant.calibration.dataset import Calibration
from neoquant.calibration.hidden_states import HiddenStates
from neoquant.calibration.memory import CalibrationMemory
from neoquant.calibration.share import Share
from neoquant.checkpoint import Checkpoint, CheckpointWriter
from neoquant.errors import locate
from neoquant.formats.base import dtype_name
from neoquant.model.config import GPTNeoConfig
from neoquant.model.devices import device_name
from neoquant.progress import Progress
from neoquant.quantization.plan import Plan, PlanRow
from neoquant.quantization.resume import FinishedBlock, ResumableRun
from neoquant.quantization.reverse import calibrating, look_at_unquantized
from neoquant.quantization.sequential import QuantizedBlock, embed, quantize_blocks
from neoquant.quantization.source_hash import hash_tensor, join_hashes
from neoquant.quantization.streaming import Written, headers_of, output_tensors
from neoquant.tensor import QuantizedTensor

Output = Mapping[str, Mapping[str, torch.Tensor]]
"""Tensor of the source -> what the output holds in its place, by name."""


def write_calibrated(
    checkpoint: Checkpoint,
    plan: Plan,
    calibration: Calibration,
    memory: CalibrationMemory,
    sink: CheckpointWriter | None,
    run: ResumableRun,
    progress: Progress,
) -> Written | None:
    """Carry out a plan whose quantizers need calibration, from where `run` was interrupted.

    Returns the plan with the tensors as they were stored, a record of every layer, and the time of those layers that
    this call quantized. Of several processes that share the run, the first one writes: the others have no `sink`, and
    None is returned.
    """
    # in the file's order, which need not be the blocks'
    digest = join_hashes([hash_tensor(row.source, checkpoint.read(row.name)) for row in plan.rows])
    config = GPTNeoConfig.from_dict(checkpoint.config)
    _begin(run, _identity(checkpoint, plan, calibration, memory, digest), config.num_layers)
    writer = None if sink is None else _Writer(checkpoint, plan, digest, sink)
    look_at_unquantized(checkpoint, plan, calibration, memory, run, progress)
    with torch.inference_mode():
        if writer is not None:
            writer.begin(run)
        if run.finished:
            progress.note(f"resuming after block {run.finished} of {run.blocks}")
        hidden = _hidden_states(checkpoint, calibration, config, memory, run)
        first = run.finished
        samples = calibrating(hidden, calibration, memory, run)
        blocks = quantize_blocks(checkpoint, plan, samples, first, progress)
        for number, block in enumerate(blocks, first):
            run.keep(number, None if writer is None else writer.put_new(block), hidden)
        hidden.close()
    return None if writer is None else writer.written()


def _begin(run: ResumableRun, identity: dict[str, Any], blocks: int) -> None:
    """Begin a run, or go on with it, in all its processes. Raises RequestError where they would not make the same."""
    here = {"threads", "device"}  # which processes may have of their own
    run.group.require_equal(json.dumps({key: value for key, value in identity.items() if key not in here}))
    processes = {"processes": run.group.size} if run.group.size > 1 else {}
    run.begin({**identity, **processes}, blocks)


class _Writer:
    """Writes outputs as they come, and remembers what a `Written` says."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, source_hash: str, sink: CheckpointWriter) -> None:
        self.checkpoint, self.plan, self.source_hash, self.sink = checkpoint, plan, source_hash, sink
        self.stored: dict[str, Any] = {}
        self.layers: dict[str, Any] = {}
        self.layer_seconds: dict[str, float] = {}

    def begin(self, run: ResumableRun) -> None:
        """Write what is of no block, and the blocks that are finished."""
        for row in self.plan.rows:
            if row.block is None:
                self.put({row.name: _output(self.checkpoint, self.plan, row)})
        for number in range(run.finished):
            self.put_block(run.block(number))

    def put_new(self, block: QuantizedBlock) -> FinishedBlock:
        """Write a block, and return it as it is kept."""
        output = {row.name: _output(self.checkpoint, self.plan, row, block.weights.get(row.name)) for row in block.rows}
        finished = FinishedBlock(output, {layer: report.to_dict() for layer, report in block.reports.items()})
        self.put_block(finished)
        self.layer_seconds |= {layer: report.seconds for layer, report in block.reports.items()}
        return finished

    def put(self, output: Output) -> None:
        for row, tensors in output.items():
            for name, tensor in tensors.items():
                self.sink.put(name, tensor)
            self.stored[row] = headers_of(tensors)

    def put_block(self, block: FinishedBlock) -> None:
        self.put(block.output)
        self.layers |= block.reports

    def written(self) -> Written:
        rows = tuple(replace(row, stored=self.stored[row.name]) for row in self.plan.rows)
        return Written(replace(self.plan, rows=rows), self.source_hash, self.layers, self.layer_seconds)


def _output(
    checkpoint: Checkpoint, plan: Plan, row: PlanRow, quantized: QuantizedTensor | None = None
) -> dict[str, torch.Tensor]:
    with locate(checkpoint.source), locate(row.name):
        return output_tensors(checkpoint.read(row.name), row, plan.format, quantized)


def _hidden_states(
    checkpoint: Checkpoint,
    calibration: Calibration,
    config: GPTNeoConfig,
    memory: CalibrationMemory,
    run: ResumableRun,
) -> HiddenStates:
    """This process's calibration samples as the first block that is not finished sees them."""
    ids = Share.of(calibration.ids, run.group).ids
    shape, device = (*ids.shape, config.hidden_size), torch.device(memory.device)
    hidden = run.hidden_states(shape, memory.spilled, device)
    if hidden is None:
        hidden = run.new_hidden_states(shape, memory.spilled, device)
        embed(checkpoint, ids, hidden)
    return hidden


def _identity(
    checkpoint: Checkpoint, plan: Plan, calibration: Calibration, memory: CalibrationMemory, digest: str
) -> dict[str, Any]:
    """Everything that the bytes of a calibrated run follow from, as plain values."""
    from neoquant import __version__

    ids = hashlib.sha256(calibration.ids.contiguous().numpy().data).hexdigest()
    config = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode()).hexdigest()
    return {
        "neoquant": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),  # sums are split among them
        "device": device_name(torch.device(memory.device)),  # and cards round them in other orders
        "model": {"tensors": digest, "config": config},
        "recipe": plan.recipe.model_dump(mode="json", exclude_unset=True),
        "quantizers": _quantizers(plan),  # with what the recipe leaves to defaults, which another version may change
        "format": plan.format.name,
        "dtype": dtype_name(plan.dtype),
        "calibration": {**calibration.describe(), "tokens": ids},
    }


def _quantizers(plan: Plan) -> list[dict[str, Any]]:
    """Every quantizer of the plan with all its options, once."""
    found: list[dict[str, Any]] = []
    for row in plan.rows:
        if row.quantizer is not None and row.quantizer.describe() not in found:
            found.append(row.quantizer.describe())
    return found
