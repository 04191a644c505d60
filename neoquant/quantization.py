"""Carry a plan out: read a tensor, quantize it, write it, forget it; at the end there is a whole checkpoint or none."""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import xxhash

from neoquant.calibrated import block_of, embed, needs_calibration, quantize_blocks, require_calibration
from neoquant.calibration import LENGTH, ROWS, Calibration
from neoquant.card import render_card
from neoquant.checkpoint import (
    SHARD_SIZE,
    Checkpoint,
    CheckpointWriter,
    TensorHeader,
    check_output,
    free_bytes,
    open_checkpoint,
)
from neoquant.costs import Need, foresee
from neoquant.errors import CheckpointError, FormatError, OutputError, RequestError, locate
from neoquant.formats import Format
from neoquant.formats.base import dtype_name
from neoquant.grids import Grid
from neoquant.model.config import GPTNeoConfig
from neoquant.native import leaving_cores
from neoquant.planning import EMBEDDING, IN_FLIGHT_BYTES, Plan, PlanRow, make_plan
from neoquant.progress import SILENT, Progress
from neoquant.quantizers import Quantizer
from neoquant.quantizers.gptq import Report
from neoquant.recipe import Recipe
from neoquant.record import Layers
from neoquant.tensor import QuantizedTensor
from neoquant.unfinished import FinishedBlock, Unfinished, has_unfinished

RECORD = "neoquant.json"
"""File in the output folder that says, for machines, what was done."""

CARD = "README.md"

CALIBRATION = "calibration.json"
"""File in the output folder that says what calibrated quantizers saw, and how each layer came out."""

_NO_DIGEST = "0" * 64  # as long as SHA-256's


@dataclass(frozen=True)
class QuantizeResult:
    """What `quantize` made: the plan as it was carried out, with the sizes as they became, and what it cost."""

    folder: Path
    plan: Plan
    source_hash: str
    output_bytes: int
    seconds: float
    peak_rss_bytes: int
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """How each layer that saw calibration text came out, as `calibration.json` says."""
    layer_seconds: Mapping[str, float] = field(default_factory=dict)
    """What each took that this run did: in no file, so that two runs leave the same bytes."""


def plan(
    source: str | Path | None,
    recipe: Recipe,
    *,
    revision: str | None = None,
    shard_size: int = SHARD_SIZE,
    name: str = "out",
    calibration_rows: int = ROWS,
    calibration_length: int | None = None,
    max_memory: int | None = None,
    progress: Progress = SILENT,
) -> Plan:
    """What `quantize` would do, from headers alone; of a model on the hub only kilobytes are fetched.

    Args:
        source: a folder, a hub id, or None for the bundled model.
        recipe: what is asked for.
        revision: branch, tag or commit on the hub.
        shard_size: bytes of tensors in one output file.
        name: of the output folder, which the model card mentions.
        calibration_rows: of text, for what a calibrated run takes.
        calibration_length: tokens of a row; None is 2,048, or the model's context where that is shorter.
        max_memory: as for `quantize`.
        progress: told of downloads, where a model has no headers to fetch alone.

    Raises:
        RequestError: the recipe cannot be carried out on this model; every reason is named. Or `max_memory` is too
            little for one block.
        CheckpointError, HubError: the source cannot be read, or is not a GPT-Neo.
    """
    location = _location(source)
    with open_checkpoint(location, revision=revision, headers_only=True, progress=progress) as checkpoint:
        planned = _whole_plan(checkpoint, recipe, shard_size, name)
    if not needs_calibration(planned):
        return planned
    config = GPTNeoConfig.from_dict(dict(planned.config))
    length = calibration_length or min(LENGTH, config.max_position_embeddings)
    return replace(planned, calibrating=foresee(config, calibration_rows, length, max_memory))


def quantize(
    source: str | Path | None,
    out: str | Path,
    recipe: Recipe,
    *,
    revision: str | None = None,
    force: bool = False,
    shard_size: int = SHARD_SIZE,
    calibration: Calibration | None = None,
    max_memory: int | None = None,
    restart: bool = False,
    progress: Progress = SILENT,
) -> QuantizeResult:
    """Quantize a checkpoint into the folder `out`, one tensor in memory at a time; the same request, the same bytes.

    A calibrated run keeps each finished block in a hidden folder beside `out` until all are: however it ends, the same
    request goes on from there, and makes the same bytes.

    Args:
        source: a folder, a hub id, or None for the bundled model.
        out: the folder to make; with `force` it may be an existing model, which is replaced at the very end.
        recipe: what is asked for.
        revision: branch, tag or commit on the hub.
        force: see `out`.
        shard_size: bytes of tensors in one output file.
        calibration: text for quantizers that must see the layers' inputs.
        max_memory: bytes that a calibrated run may take; where they are too few for the rows' hidden states, those are
            kept in files. Changes nothing in the result.
        restart: drop what an unfinished run left, instead of going on with it.
        progress: told of the bytes of the source dealt with, and of downloads.

    Raises:
        RequestError: the recipe cannot be carried out on this model; every reason is named. Or `out` is the source, or
            what is unfinished was another request, or `max_memory` is too little for one block.
        OutputError: `out` exists or cannot be written, or the disk has too little space: found before any work. Or
            another process makes it, or what is unfinished is damaged.
        CheckpointError, HubError: the source cannot be read, is not a GPT-Neo, or holds weights that are not finite or
            do not fit the type they are to be stored in.
    """
    started = time.perf_counter()
    location = _location(source)
    out = Path(out).expanduser().resolve()
    require_another_folder(location, out)
    check_output(out, force)
    with open_checkpoint(location, revision=revision, headers_only=True, progress=progress) as headers:
        planned = _whole_plan(headers, recipe, shard_size, out.name)
    require_calibration(planned, calibration)
    need = None
    if calibration is not None:
        rows, length = calibration.ids.shape
        need = foresee(GPTNeoConfig.from_dict(dict(planned.config)), rows, length, max_memory)
    elif max_memory is not None:
        raise RequestError("max_memory limits calibrated runs; without calibration few tensors are in memory at once")
    _require_space(out, planned.output_bytes + (0 if need is None else need.disk))
    with (
        _unfinished(out, calibration, restart) as unfinished,
        CheckpointWriter(out, force=force, shard_size=shard_size, tensors=len(planned.stored)) as sink,
        open_checkpoint(location, revision=planned.revision, progress=progress) as checkpoint,
    ):
        records: dict[str, str] = {}
        layers: dict[str, Any] = {}
        took: dict[str, float] = {}
        if calibration is None or unfinished is None or need is None:
            done, digest = _write_tensors(checkpoint, planned, sink, progress)
        else:
            done, digest, layers, took = _write_calibrated(
                checkpoint, planned, calibration, need, sink, unfinished, progress
            )
            seen = {"calibration": calibration.describe(), "documents": calibration.documents, "layers": layers}
            records[CALIBRATION] = _json(seen)
        travelling = {path.name: path for path in checkpoint.companions()}
        sink.finish(done.config, files={**travelling, **_own_files(done, digest, out.name, layers), **records})
        if unfinished is not None:
            unfinished.remove()
    return QuantizeResult(
        folder=out,
        plan=done,
        source_hash=digest,
        output_bytes=sum(path.stat().st_size for path in out.iterdir()),
        seconds=time.perf_counter() - started,
        peak_rss_bytes=peak_rss_bytes(),
        layers=layers,
        layer_seconds=took,
    )


def peak_rss_bytes() -> int:
    """The most memory this process has held at any time since it started."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts the parent of a forked process as well
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if line is not None:
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _location(source: str | Path | None) -> str | Path:
    if source is not None:
        return source
    from neoquant import demo

    return demo.MODEL


def _whole_plan(checkpoint: Checkpoint, recipe: Recipe, shard_size: int, name: str) -> Plan:
    """The plan of the tensors, and the size of the files beside them."""
    planned = make_plan(checkpoint, recipe, shard_size=shard_size)
    layers: dict[str, Any] = {}
    written = [_json(planned.config)]
    if needs_calibration(planned):
        error = 0.012345678901234567
        report = Report("attention", "range", 0.01, 0, False, 0, error, error, 0.0).to_dict()
        seen = {"source": "about so long", "sha256": _NO_DIGEST, "rows": ROWS, "length": LENGTH, "seed": 0}
        calibrated = [row for row in planned.rows if row.quantizer is not None and row.quantizer.needs_calibration]
        layers = {row.layer: report for row in calibrated}
        written.append(_json({"calibration": seen, "layers": layers}))
    written += _own_files(planned, _joined([]), name, layers).values()
    companions = checkpoint.companion_sizes()
    beside = sum(companions.values()) + sum(len(text.encode()) for text in written)
    notes = planned.notes
    if "tokenizer.json" not in companions and not {"vocab.json", "merges.txt"} <= companions.keys():
        notes += ("no tokenizer beside these weights: the result can be loaded, but not evaluated or generated with",)
    return replace(planned, other_bytes=beside, notes=notes)


def require_another_folder(source: str | Path, out: Path) -> None:
    """Replacing the source would leave nobody with the weights before they were rounded."""
    if Path(source).is_dir() and Path(source).resolve() == out:
        raise RequestError(f"{source} is the model to read, and would be lost: name another folder to make")


@contextmanager
def _unfinished(out: Path, calibration: Calibration | None, restart: bool) -> Iterator[Unfinished | None]:
    """What is kept of a calibrated run; another kind keeps nothing, and does not leave a calibrated one behind."""
    if calibration is None and not has_unfinished(out):
        yield None
        return
    with Unfinished(out, restart=restart) as unfinished:
        if calibration is not None:
            yield unfinished
            return
        if not restart:
            raise unfinished.another("a calibrated one")
        unfinished.remove()
        yield None


def _require_space(out: Path, needed: int) -> None:
    free = free_bytes(out)
    if free < needed:
        raise OutputError(f"{out}: {needed / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free on this disk")


def _write_tensors(
    checkpoint: Checkpoint, planned: Plan, sink: CheckpointWriter, progress: Progress
) -> tuple[Plan, str]:
    """Carry out every row; return the plan with the tensors as they were stored, and the hash of the source's.

    Hashing the source and writing the output have a thread of their own, and quantizing this one: both leave Python's
    lock alone while they work. Two tensors are alive, the one at hand and the one before it, and of earlier ones, with
    what was made of them, at most `IN_FLIGHT_BYTES`.
    """
    rows: list[PlanRow] = []
    lines: list[bytes] = []
    behind: deque[tuple[PlanRow, Future[bytes]]] = deque()
    with (
        progress.task("quantizing", total=planned.source_bytes) as advance,
        torch.inference_mode(),
        leaving_cores(1),
        _thread("writing") as writing,
    ):

        def wait_for_the_oldest() -> None:
            row, written = behind.popleft()
            lines.append(written.result())
            advance(row.source.nbytes)

        for row in planned.rows:
            while sum(_bytes_waiting(waiting) for waiting, _ in list(behind)[:-1]) > IN_FLIGHT_BYTES:
                wait_for_the_oldest()
            with locate(checkpoint.source), locate(row.name):
                weight = checkpoint.view(row.name)
                tensors = made_of(weight, row, checkpoint, planned.format)
            rows.append(replace(row, stored=_headers(tensors)))
            behind.append((rows[-1], writing.submit(_write_behind, row.source, weight, tensors, checkpoint, sink)))
        while behind:
            wait_for_the_oldest()
    return replace(planned, rows=tuple(rows)), _joined(lines)


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
    line = _hash(header, weight)
    for stored, tensor in tensors.items():
        sink.put(stored, tensor)
    checkpoint.forget(header.name)
    return line


def _write_calibrated(
    checkpoint: Checkpoint,
    planned: Plan,
    calibration: Calibration,
    need: Need,
    sink: CheckpointWriter,
    unfinished: Unfinished,
    progress: Progress,
) -> tuple[Plan, str, dict[str, Any], dict[str, float]]:
    """The same block after block, with a record of every layer, and how long those took that this run did."""
    # in the file's order, which need not be the blocks'
    digest = _joined([_hash(row.source, checkpoint.read(row.name)) for row in planned.rows])
    config = GPTNeoConfig.from_dict(checkpoint.config)
    unfinished.begin(_identity(checkpoint, planned, calibration, digest), config.num_layers)
    stored: dict[str, tuple[TensorHeader, ...]] = {}
    layers: dict[str, Any] = {}
    took: dict[str, float] = {}

    def make(row: PlanRow, given: QuantizedTensor | None = None) -> dict[str, torch.Tensor]:
        with locate(checkpoint.source), locate(row.name):
            return made_of(checkpoint.read(row.name), row, checkpoint, planned.format, given)

    def put(made: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        for row, tensors in made.items():
            for name, tensor in tensors.items():
                sink.put(name, tensor)
            stored[row] = _headers(tensors)

    with torch.inference_mode():
        for row in planned.rows:
            if block_of(row) is None:
                put({row.name: make(row)})
        for number in range(unfinished.finished):
            block = unfinished.block(number)
            put(block.made)
            layers |= block.reports
        if unfinished.finished:
            progress.note(f"going on behind block {unfinished.finished} of {unfinished.blocks}")
        shape = (*calibration.ids.shape, config.hidden_size)
        states = unfinished.states(shape, need.spilled)
        if states is None:
            states = unfinished.no_states(shape, need.spilled)
            embed(checkpoint, calibration.ids, states)
        first = unfinished.finished
        for number, quantized in enumerate(
            quantize_blocks(checkpoint, planned, states, first, progress, need.keeps_inner), first
        ):
            made = {row.name: make(row, quantized.weights.get(row.name)) for row in quantized.rows}
            block = FinishedBlock(made, {layer: report.to_dict() for layer, report in quantized.reports.items()})
            put(block.made)
            layers |= block.reports
            took |= {layer: report.seconds for layer, report in quantized.reports.items()}
            unfinished.keep(number, block, states)
        states.close()
    done = replace(planned, rows=tuple(replace(row, stored=stored[row.name]) for row in planned.rows))
    return done, digest, layers, took


def _identity(checkpoint: Checkpoint, planned: Plan, calibration: Calibration, digest: str) -> dict[str, Any]:
    """Everything that the bytes of a calibrated run follow from, as plain values."""
    from neoquant import __version__

    ids = hashlib.sha256(calibration.ids.contiguous().numpy().data).hexdigest()
    config = hashlib.sha256(_json(checkpoint.config).encode()).hexdigest()
    return {
        "neoquant": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),  # sums are split among them
        "model": {"tensors": digest, "config": config},
        "recipe": planned.recipe.model_dump(mode="json", exclude_unset=True),
        "format": planned.format.name,
        "dtype": dtype_name(planned.dtype),
        "calibration": {**calibration.describe(), "tokens": ids},
    }


def _headers(tensors: Mapping[str, torch.Tensor]) -> tuple[TensorHeader, ...]:
    return tuple(TensorHeader(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())


def made_of(
    weight: torch.Tensor, row: PlanRow, checkpoint: Checkpoint, format: Format, given: QuantizedTensor | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of the output, by name, that take the place of one of the source.

    Raises:
        CheckpointError: the weight is not finite, does not fit its type, or is not the tensor it is said to be tied to.
        FormatError: its grid cannot hold it.
    """
    if row.action == "drop":
        require_tied(weight, checkpoint.read(EMBEDDING))
        return {}
    if row.grid is None or row.quantizer is None:
        return {row.stored[0].name: converted(weight, row.stored[0].dtype)}
    quantized = _quantized(weight, row.grid, row.quantizer) if given is None else given
    prefix = (row.stored_name or row.name).removesuffix(".weight")
    return {prefix + suffix: tensor for suffix, tensor in format.encode(quantized).items()}


def _quantized(weight: torch.Tensor, grid: Grid, quantizer: Quantizer) -> QuantizedTensor:
    """Every grid looks at its scales: only a weight that was refused need be searched for what is not finite."""
    try:
        return quantizer.quantize(weight, grid)
    except FormatError:
        _require_finite(weight)
        raise


def require_tied(head: torch.Tensor, embedding: torch.Tensor) -> None:
    if not torch.equal(head, embedding):
        raise CheckpointError(
            f"differs from {EMBEDDING}, though config.json ties the two; set tie_word_embeddings to false to keep both"
        )


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
        largest = max(abs(float(edge)) for edge in weight.aminmax())
        hint = '; a recipe with dtype = "bfloat16" can store it' if dtype == torch.float16 else ""
        raise CheckpointError(
            f"holds {largest:.6g}, more than {dtype_name(dtype)} can ({torch.finfo(dtype).max:.6g}){hint}"
        )
    return converted


def _require_finite(weight: torch.Tensor) -> None:
    if not _is_finite(weight):
        bad = int((~torch.isfinite(weight)).sum())
        raise CheckpointError(f"holds NaN or infinity ({bad} of {weight.numel()} values); the checkpoint is damaged")


def _is_finite(weight: torch.Tensor) -> bool:
    """Without a temporary of the weight's size, which isfinite() takes several of."""
    return weight.numel() == 0 or all(bool(edge.isfinite()) for edge in weight.aminmax())


def _hash(header: TensorHeader, weight: torch.Tensor) -> bytes:
    """A tensor's line in the hash of the source: `name dtype [shape] XXH3-128 of its bytes`."""
    digest = xxhash.xxh3_128_hexdigest(weight.reshape(-1).view(torch.uint8).numpy().data)
    return f"{header.name} {dtype_name(header.dtype)} {list(header.shape)} {digest}\n".encode()


def _joined(lines: Iterable[bytes]) -> str:
    """The hash of the source: XXH3-128 of every tensor's line, in the order of the file.

    It tells sources apart, at the speed of memory; SHA-256 took longer than all else together. It is no seal: whoever
    wants to can make weights of any hash, and could as well write any hash into the record.
    """
    return f"xxh3_128:{xxhash.xxh3_128_hexdigest(b''.join(lines))}"


def _own_files(done: Plan, digest: str, name: str, layers: Layers) -> dict[str, str]:
    """The card and the record."""
    from neoquant import __version__

    record = {"neoquant": __version__, "source_hash": digest, **done.to_dict()}
    return {CARD: render_card(done, name, layers), RECORD: _json(record)}


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
