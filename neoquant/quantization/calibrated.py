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
from neoquant.checkpoint import Checkpoint, CheckpointWriter
from neoquant.errors import locate
from neoquant.formats.base import dtype_name
from neoquant.model.config import GPTNeoConfig
from neoquant.model.devices import device_name
from neoquant.progress import Progress
from neoquant.quantization.plan import Plan, PlanRow
from neoquant.quantization.resume import FinishedBlock, ResumableRun
from neoquant.quantization.reverse import keep_output_hessians, needs_gradients
from neoquant.quantization.sequential import Calibrating, embed, quantize_blocks
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
    sink: CheckpointWriter,
    run: ResumableRun,
    progress: Progress,
) -> Written:
    """Carry out a plan whose quantizers need calibration, from where `run` was interrupted.

    Returns the plan with the tensors as they were stored, a record of every layer, and the time of those layers that
    this call quantized.
    """
    # in the file's order, which need not be the blocks'
    digest = join_hashes([hash_tensor(row.source, checkpoint.read(row.name)) for row in plan.rows])
    config = GPTNeoConfig.from_dict(checkpoint.config)
    run.begin(_identity(checkpoint, plan, calibration, memory, digest), config.num_layers)
    writer = _Writer(plan, digest, sink)
    if needs_gradients(plan):
        keep_output_hessians(checkpoint, plan, calibration, memory, run, progress)
    with torch.inference_mode():
        for row in plan.rows:
            if row.block is None:
                writer.put({row.name: _output(checkpoint, plan, row)})
        for number in range(run.finished):
            writer.put_block(run.block(number))
        if run.finished:
            progress.note(f"resuming after block {run.finished} of {run.blocks}")
        hidden, reference = _hidden_states(checkpoint, calibration, config, memory, run)
        first = run.finished
        output_hessians = run.output_hessians if memory.methods.gradients else None
        samples = Calibrating(hidden, memory.keeps_inner, output_hessians, reference)
        blocks = quantize_blocks(checkpoint, plan, samples, first, progress)
        for number, block in enumerate(blocks, first):
            output = {row.name: _output(checkpoint, plan, row, block.weights.get(row.name)) for row in block.rows}
            finished = FinishedBlock(output, {layer: report.to_dict() for layer, report in block.reports.items()})
            writer.put_block(finished)
            writer.layer_seconds |= {layer: report.seconds for layer, report in block.reports.items()}
            run.keep(number, finished, hidden, reference)
        hidden.close()
        if reference is not None:
            reference.close()
    return writer.written()


class _Writer:
    """Writes outputs as they come, and remembers what a `Written` says."""

    def __init__(self, plan: Plan, source_hash: str, sink: CheckpointWriter) -> None:
        self.plan, self.source_hash, self.sink = plan, source_hash, sink
        self.stored: dict[str, Any] = {}
        self.layers: dict[str, Any] = {}
        self.layer_seconds: dict[str, float] = {}

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
) -> tuple[HiddenStates, HiddenStates | None]:
    """The calibration samples as the first block that is not finished sees them, and would in the unquantized model."""
    rows, length = calibration.ids.shape
    shape = (rows, length, config.hidden_size)
    found, device = [], torch.device(memory.device)
    for kind in ("hidden", "reference") if memory.methods.reference else ("hidden",):
        states = run.hidden_states(shape, memory.spilled, kind, device)
        if states is None:
            states = run.new_hidden_states(shape, memory.spilled, device)
            embed(checkpoint, calibration.ids, states)
        found.append(states)
    return found[0], found[1] if len(found) > 1 else None


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
        "format": plan.format.name,
        "dtype": dtype_name(plan.dtype),
        "calibration": {**calibration.describe(), "tokens": ids},
    }
