"""Carry a plan out; at the end there is a whole checkpoint or none."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from neoquant import demo
from neoquant.calibration.dataset import LENGTH, ROWS, Calibration
from neoquant.calibration.memory import CalibrationMemory, estimate_memory
from neoquant.checkpoint import SHARD_SIZE, Checkpoint, CheckpointWriter, check_output, free_bytes, open_checkpoint
from neoquant.distributed import SINGLE_PROCESS, ProcessGroup
from neoquant.errors import CheckpointError, OutputError, RequestError
from neoquant.files.names import output_folder
from neoquant.files.reading import MAX_LARGE_BYTES, read_json
from neoquant.files.writing import as_bytes
from neoquant.model.config import GPTNeoConfig
from neoquant.model.devices import cpu_by_default, device_name, resolve_device
from neoquant.progress import SILENT, Progress
from neoquant.quantization.calibrated import write_calibrated
from neoquant.quantization.model_card import render_card
from neoquant.quantization.plan import Plan, PlanRow, make_plan
from neoquant.quantization.recipe import Recipe
from neoquant.quantization.resume import ResumableRun, has_interrupted_run
from neoquant.quantization.reverse import gradients_record, methods_of
from neoquant.quantization.sequential import ATTENTION_INPUTS, needs_calibration, require_calibration
from neoquant.quantization.source_hash import join_hashes
from neoquant.quantization.streaming import Written, write_streaming
from neoquant.quantizers.base import LayerReport
from neoquant.sizes import peak_rss_bytes, size

RECORD = "neoquant.json"
"""File in the output folder that says, for machines, what was done."""

CARD = "README.md"

CALIBRATION = "calibration.json"
"""File in the output folder that says what calibrated quantizers saw, and how each layer came out."""

_NO_DIGEST = "0" * 64  # as long as SHA-256's


@dataclass(frozen=True)
class QuantizeResult:
    """What `quantize` made: the plan as carried out, with the final sizes, the time and the memory."""

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
    recipe: Recipe | str | Path,
    *,
    revision: str | None = None,
    shard_size: int = SHARD_SIZE,
    name: str = "out",
    calibration_rows: int = ROWS,
    calibration_length: int | None = None,
    max_memory: int | None = None,
    device: object = "cpu",
    processes: int = 1,
    progress: Progress = SILENT,
) -> Plan:
    """What `quantize` would do, from headers alone; of a model on the hub only kilobytes are fetched.

    Args:
        source: a folder, a hub id, or None for the bundled model.
        recipe: what is asked for: a recipe, the name of one that comes with neoquant ("nf4", "gptq4"), or a TOML file.
        revision: branch, tag or commit on the hub.
        shard_size: bytes of tensors in one output file.
        name: of the output folder, which the model card mentions.
        calibration_rows: of text, for what a calibrated run takes.
        calibration_length: tokens of a row; None is 2,048, or the model's context where that is shorter.
        max_memory: as for `quantize`.
        device: as for `quantize`.
        processes: that share a calibrated run; memory is what each takes.
        progress: told of downloads, where a model has no headers to fetch alone.

    Raises:
        RequestError: the recipe cannot be carried out on this model; every reason is named. Or `max_memory` is too
            little for one block, or the device is not there.
        CheckpointError, HubError: the source cannot be read, or is not a GPT-Neo.
    """
    recipe, place = Recipe.of(recipe), resolve_device(device)
    with open_checkpoint(source, revision=revision, headers_only=True, progress=progress) as checkpoint:
        planned = _whole_plan(checkpoint, recipe, shard_size, name)
    if not needs_calibration(planned):
        _require_cpu(place)
        _require_single(processes)
        return planned
    config = GPTNeoConfig.from_dict(dict(planned.config))
    length = calibration_length or min(LENGTH, config.max_position_embeddings)
    need = estimate_memory(config, calibration_rows, length, max_memory, methods_of(planned), place, processes)
    return replace(planned, calibrating=need)


@cpu_by_default()
def quantize(
    source: str | Path | None,
    out: str | Path,
    recipe: Recipe | str | Path,
    *,
    revision: str | None = None,
    force: bool = False,
    shard_size: int = SHARD_SIZE,
    calibration: Calibration | None = None,
    max_memory: int | None = None,
    restart: bool = False,
    device: object = "cpu",
    progress: Progress = SILENT,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> QuantizeResult:
    """Quantize a checkpoint into the folder `out`, one tensor in memory at a time; the same request, the same bytes.

    A calibrated run keeps each finished block in a hidden folder beside `out` until all are: however it ends, the same
    request goes on from there, and makes the same bytes.

    Args:
        source: a folder, a hub id, or None for the bundled model.
        out: the folder to make; with `force` it may be an existing model, which is replaced at the very end.
        recipe: what is asked for: a recipe, the name of one that comes with neoquant ("nf4", "gptq4"), or a TOML file.
        revision: branch, tag or commit on the hub.
        force: see `out`.
        shard_size: bytes of tensors in one output file.
        calibration: text for quantizers that must see the layers' inputs.
        max_memory: bytes that a calibrated run may take; where they are too few for the rows' hidden states, those are
            kept in files. Changes nothing in the result.
        restart: drop what an unfinished run left, instead of going on with it.
        device: where a calibrated run computes, "cpu", "cuda", "cuda:1", ...; `max_memory` is then that device's.
            Columns are rounded on the CPU where the native library does it and Triton does not. Other devices, other
            bytes.
        progress: told of the bytes of the source dealt with, and of downloads.
        process_group: the processes that share a calibrated run, each of which calls this alike, on a device of its
            own, and gets the result. The first one writes. As many must go on with what is unfinished.

    Raises:
        RequestError: the recipe cannot be carried out on this model; every reason is named. Or `out` is the source, or
            what is unfinished was another request, or `max_memory` is too little for one block, or the device is not
            there. Or processes are to share what needs no calibration.
        LostProcessError: one of the processes has ended.
        OutputError: `out` exists or cannot be written, or the disk has too little space: found before any work. Or
            another process makes it, or what is unfinished is damaged.
        CheckpointError, HubError: the source cannot be read, is not a GPT-Neo, or holds weights that are not finite or
            do not fit the type they are to be stored in.
    """
    started = time.perf_counter()
    recipe, place = Recipe.of(recipe), resolve_device(device)
    out = output_folder(out)
    require_another_folder(source, out)
    check_output(out, force)
    with open_checkpoint(source, revision=revision, headers_only=True, progress=progress) as headers:
        planned = _whole_plan(headers, recipe, shard_size, out.name)
    memory = _calibration_memory(planned, calibration, max_memory, place, process_group)
    _require_space(out, planned.output_bytes + (0 if memory is None else memory.disk * process_group.local_size))
    with (
        _resumable(out, calibration, restart, process_group) as run,
        _sink(out, force, shard_size, planned, process_group) as sink,
    ):
        process_group.wait()  # nobody refuses, and so weights are read
        with open_checkpoint(source, revision=planned.revision, progress=progress) as checkpoint:
            if checkpoint.config != headers.config:  # only the values show that a head is not the embedding
                planned = _whole_plan(checkpoint, recipe, shard_size, out.name)
            if calibration is None or run is None or memory is None:
                assert sink is not None  # there is one process
                written: Written | None = write_streaming(checkpoint, planned, sink, progress)
            else:
                written = write_calibrated(checkpoint, planned, calibration, memory, sink, run, progress)
            checkpoint.require_unchanged()
            process_group.wait()  # nobody has seen a change
            if sink is not None and written is not None:
                companions: dict[str, Path | str] = {path.name: path for path in checkpoint.companions()}
                own = _own_files(written, out.name, calibration, place, process_group.size)
                sink.finish(written.plan.config, files={**companions, **own})
        if run is not None:
            run.remove_all()
    peak = max(process_group.all_gather(peak_rss_bytes()))
    made: QuantizeResult = process_group.broadcast(None if written is None else _result(out, written, started, peak))
    return made


def _result(out: Path, written: Written, started: float, peak: int) -> QuantizeResult:
    return QuantizeResult(
        folder=out,
        plan=written.plan,
        source_hash=written.source_hash,
        output_bytes=sum(path.stat().st_size for path in out.iterdir()),
        seconds=time.perf_counter() - started,
        peak_rss_bytes=peak,
        layers=written.layers,
        layer_seconds=written.layer_seconds,
    )


@contextmanager
def _sink(
    out: Path, force: bool, shard_size: int, planned: Plan, group: ProcessGroup
) -> Iterator[CheckpointWriter | None]:
    """What writes the output, in the first process; None in the others."""
    if group.rank:
        yield None
        return
    with CheckpointWriter(out, force=force, shard_size=shard_size, tensors=len(planned.stored)) as sink:
        yield sink


def _calibration_memory(
    planned: Plan,
    calibration: Calibration | None,
    max_memory: int | None,
    device: torch.device,
    group: ProcessGroup,
) -> CalibrationMemory | None:
    """What a calibrated run takes; None for another. Raises RequestError where plan and calibration do not fit."""
    require_calibration(planned, calibration)
    if calibration is not None:
        rows, length = calibration.ids.shape
        config = GPTNeoConfig.from_dict(dict(planned.config))
        return estimate_memory(config, rows, length, max_memory, methods_of(planned), device, group.size)
    _require_cpu(device)
    _require_single(group.size)
    if max_memory is not None:
        raise RequestError("max_memory limits calibrated runs; without calibration few tensors are in memory at once")
    return None


def _require_cpu(device: torch.device) -> None:
    """Raise RequestError for a run that a GPU would not make faster: it reads and writes as long as it rounds."""
    if device.type != "cpu":
        raise RequestError(f"--device {device} is for calibrated runs; others round weights on the CPU: leave it out")


def _require_single(processes: int) -> None:
    """Raise RequestError for a run that several processes would not make faster."""
    if processes > 1:
        raise RequestError(
            f"{processes} processes share calibrated runs; others round weights as fast as they are read and written: "
            "start one process, without torchrun"
        )


def _whole_plan(checkpoint: Checkpoint, recipe: Recipe, shard_size: int, name: str) -> Plan:
    """The plan of the tensors, and the size of the files beside them."""
    planned = make_plan(checkpoint, recipe, shard_size=shard_size)
    layers: dict[str, Any] = {}
    written = [record_json(planned.config)]
    if needs_calibration(planned):
        samples = {"source": "about so long", "sha256": _NO_DIGEST, "rows": ROWS, "length": LENGTH, "seed": 0}
        layers = {row.layer: report.to_dict() for row in planned.rows if (report := _sample_report(row)) is not None}
        written.append(record_json({"calibration": samples, "layers": layers}))
    written += _own_files(Written(planned, join_hashes([]), layers), name).values()
    companions = checkpoint.companion_sizes()
    beside = sum(companions.values()) + sum(len(as_bytes(text)) for text in written)
    notes = planned.notes
    if "tokenizer.json" not in companions and not {"vocab.json", "merges.txt"} <= companions.keys():
        notes += ("no tokenizer beside these weights: the result can be loaded, but not evaluated or generated with",)
    return replace(planned, other_bytes=beside, notes=notes)


def _sample_report(row: PlanRow) -> LayerReport | None:
    """Of a layer, as long as the one that will be written."""
    if row.quantizer is None or row.grid is None or row.layer is None:
        return None
    return row.quantizer.sample_report(row.grid, row.layer.endswith(tuple(ATTENTION_INPUTS)))


def require_another_folder(source: str | Path | None, out: Path) -> None:
    """Replacing the source would leave nobody with the weights before they were rounded."""
    source = demo.resolve(source)
    if Path(source).is_dir() and Path(source).resolve() == out:
        raise RequestError(f"{source} is the model to read, and would be lost: name another folder to make")
    if out == Path(demo.NAME).resolve() and not out.exists():
        raise RequestError(
            f"a folder {demo.NAME} here would hide the model of that name, which comes with neoquant: name another one"
        )


@contextmanager
def _resumable(
    out: Path, calibration: Calibration | None, restart: bool, group: ProcessGroup
) -> Iterator[ResumableRun | None]:
    """What is kept of a calibrated run; another kind keeps nothing, and does not leave a calibrated one behind."""
    if calibration is None and not has_interrupted_run(out):
        yield None
        return
    with ResumableRun(out, restart=restart, group=group) as run:
        if calibration is not None:
            yield run
            return
        run.require_own()
        if not restart:
            raise run.other_request("a calibrated one")
        run.remove()
        yield None


def _require_space(out: Path, needed: int) -> None:
    free = free_bytes(out)
    if free < needed:
        raise OutputError(f"{out}: {size(needed)} needed, {size(free)} free on this disk")


def _own_files(
    written: Written,
    name: str,
    calibration: Calibration | None = None,
    device: torch.device | None = None,
    processes: int = 1,
) -> dict[str, str]:
    """The model card and the records."""
    from neoquant import __version__

    record = {"neoquant": __version__, "source_hash": written.source_hash, **written.plan.to_dict()}
    files = {CARD: render_card(written.plan, name, written.layers, processes), RECORD: record_json(record)}
    if calibration is not None:
        gradients = gradients_record(written.plan, calibration)
        samples = {"calibration": calibration.describe(), **gradients, "documents": calibration.documents}
        if device is not None and device.type != "cpu":
            samples["device"] = device_name(device)
        if processes > 1:
            samples["processes"] = processes
        files[CALIBRATION] = record_json({**samples, "layers": written.layers})
    return files


def record_json(value: Any) -> str:
    """How `neoquant.json` and `calibration.json` are written."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def read_record(folder: Path, name: str = RECORD) -> dict[str, Any]:
    """One of these of a folder; empty where there is none that can be read."""
    try:
        record = read_json(folder / name, limit=MAX_LARGE_BYTES)
    except CheckpointError:
        return {}
    return record if isinstance(record, dict) else {}
