"""Quantizing without calibration: read a tensor, round it, write it, let it go; hashing and writing run behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from neoquant.checkpoint import Checkpoint, CheckpointWriter, TensorHeader
from neoquant.errors import CheckpointError, FormatError, locate
from neoquant.formats import Format
from neoquant.formats.base import dtype_name
from neoquant.grids import Grid
from neoquant.native import leaving_cores
from neoquant.progress import Progress
from neoquant.quantization.plan import IN_FLIGHT_BYTES, Plan, PlanRow
from neoquant.quantization.source_hash import hash_tensor, join_hashes
from neoquant.quantizers import Quantizer
from neoquant.sizes import plural
from neoquant.tensor import QuantizedTensor


@dataclass(frozen=True)
class Written:
    """A plan as it was carried out, the hash of its source, and what calibrated layers report."""

    plan: Plan
    source_hash: str
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    layer_seconds: Mapping[str, float] = field(default_factory=dict)


def write_streaming(checkpoint: Checkpoint, plan: Plan, sink: CheckpointWriter, progress: Progress) -> Written:
    """Carry out every row.

    Hashing the source and writing the output have a thread of their own, and quantizing this one: both leave Python's
    lock alone while they work. Two tensors are alive, the one at hand and the one before it, and of earlier ones, with
    what was made of them, at most `IN_FLIGHT_BYTES`.
    """
    rows: list[PlanRow] = []
    lines: list[bytes] = []
    behind: deque[tuple[PlanRow, Future[bytes]]] = deque()
    waiting = 0  # bytes of all that is in `behind`
    with (
        progress.task("quantizing", total=plan.source_bytes) as advance,
        torch.inference_mode(),
        leaving_cores(1),
        _thread("writing") as writing,
    ):

        def wait_for_the_oldest() -> None:
            nonlocal waiting
            row, written = behind.popleft()
            waiting -= _bytes_waiting(row)
            lines.append(written.result())
            advance(row.source.nbytes)

        for row in plan.rows:
            while behind and waiting - _bytes_waiting(behind[-1][0]) > IN_FLIGHT_BYTES:
                wait_for_the_oldest()
            with locate(checkpoint.source), locate(row.name):
                weight = checkpoint.view(row.name)
                tensors = output_tensors(weight, row, plan.format)
            rows.append(replace(row, stored=headers_of(tensors)))
            waiting += _bytes_waiting(rows[-1])
            behind.append((rows[-1], writing.submit(_write_behind, row.source, weight, tensors, checkpoint, sink)))
        while behind:
            wait_for_the_oldest()
    return Written(replace(plan, rows=tuple(rows)), join_hashes(lines))


def _bytes_waiting(row: PlanRow) -> int:
    """Of a tensor of the source and of what was made of it, until that is written."""
    return row.source.nbytes + sum(header.nbytes for header in row.stored)


@contextmanager
def _thread(name: str) -> Iterator[ThreadPoolExecutor]:
    """A thread that does what it is handed, in order; what an error or Ctrl-C leaves undone is dropped."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _write_behind(
    header: TensorHeader,
    weight: torch.Tensor,
    tensors: dict[str, torch.Tensor],
    checkpoint: Checkpoint,
    sink: CheckpointWriter,
) -> bytes:
    """Hash a tensor of the source, write what was made of it, and let it go; returns its line in the hash."""
    line = hash_tensor(header, weight)
    for stored, tensor in tensors.items():
        sink.put(stored, tensor)
    checkpoint.forget(header.name)
    return line


def headers_of(tensors: Mapping[str, torch.Tensor]) -> tuple[TensorHeader, ...]:
    return tuple(TensorHeader(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())


def output_tensors(
    weight: torch.Tensor, row: PlanRow, format: Format, given: QuantizedTensor | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of the output, by name, that take the place of one of the source.

    Raises:
        CheckpointError: the weight is not finite, or does not fit its type.
        FormatError: its grid cannot hold it.
    """
    if row.action == "drop":
        return {}
    if row.target is None:
        return {row.stored[0].name: converted(weight, row.stored[0].dtype)}
    if given is None:
        weight = converted(weight, row.rounded_from) if weight.dtype != row.rounded_from else weight
        given = _quantized(weight, row.target.grid, row.target.quantizer)
    prefix = row.name.removesuffix(".weight")
    return {prefix + suffix: tensor for suffix, tensor in format.encode(given).items()}


def _quantized(weight: torch.Tensor, grid: Grid, quantizer: Quantizer) -> QuantizedTensor:
    """Every grid looks at its scales: only a weight that was refused need be searched for what is not finite."""
    try:
        return quantizer.quantize(weight, grid)
    except FormatError:
        _require_finite(weight)
        raise


def converted(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`weight` in the type it is stored in.

    Raises:
        CheckpointError: it is not finite, or not in that type's range.
    """
    if not weight.is_floating_point() or weight.numel() == 0:
        return weight.to(dtype)
    _require_finite(weight)
    if weight.dtype == dtype:
        return weight
    converted = weight.to(dtype)
    if not _is_finite(converted):
        largest = max(abs(float(edge)) for edge in weight.float().aminmax())
        hint = '; a recipe with dtype = "bfloat16" can store it' if dtype == torch.float16 else ""
        raise CheckpointError(
            f"holds {largest:.6g}, more than {dtype_name(dtype)} can ({torch.finfo(dtype).max:.6g}){hint}"
        )
    return converted


def _require_finite(weight: torch.Tensor) -> None:
    if weight.itemsize == 1:
        weight = weight.float()  # torch compares no numbers of eight bits
    if not _is_finite(weight):
        bad = int((~torch.isfinite(weight)).sum())
        raise CheckpointError(
            f"holds NaN or infinity ({bad:,} of {plural(weight.numel(), 'value')}); the checkpoint is damaged"
        )


def _is_finite(weight: torch.Tensor) -> bool:
    """Without a temporary of the weight's size, which isfinite() takes several of."""
    return weight.numel() == 0 or all(bool(edge.isfinite()) for edge in weight.aminmax())
