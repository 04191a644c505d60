"""How fast a model runs and what memory it takes, beside other programs: each run in a process of its own, in turn."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from neoquant import demo
from neoquant.checkpoint import open_checkpoint
from neoquant.errors import RequestError
from neoquant.evaluation.result import Record
from neoquant.formats import detect
from neoquant.kernels import ACTIVATIONS
from neoquant.progress import SILENT, Progress

RUNNER = Path(__file__).with_name("worker.py")
PEERS = ("transformers", "openvino")


class Run(Record):
    """One process: seconds, tokens per second, bytes."""

    import_s: float
    load_s: float
    prefill_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    peak_rss_bytes: float


class Program(Record):
    """One program on one model, and its runs; `median` is of each figure by itself."""

    label: str
    tool: str
    source: str
    versions: dict[str, str]
    runs: list[Run]
    median: Run


class Speed(Record):
    """The whole measurement; the first program is neoquant on the first model."""

    schema_version: Literal["neoquant.benchmark/1"] = "neoquant.benchmark/1"
    prompt_tokens: int
    new_tokens: int
    repeats: int
    threads: int
    dtype: str
    programs: list[Program]
    notes: list[str]

    def to_json(self) -> str:
        return self.model_dump_json(indent=1)


@dataclass(frozen=True)
class Request:
    """What to run: `models`, folders or hub ids. `base` is the plain model, for peers that cannot run one of these.

    `activations`: what may be done to them, each of "exact" and "int8" a run of its own of every quantized model.
    `pythons`: peer -> the interpreter that has it, where that is not this one.
    `without_bf16`: whether transformers runs bitsandbytes' weights once more as on a CPU without bf16 instructions,
    which bitsandbytes' fused product needs; without it weights are decoded for each product.
    """

    models: Sequence[str]
    against: Sequence[str] = ()
    base: str | None = None
    prompt: int = 128
    new: int = 64
    repeats: int = 3
    threads: int = 1
    dtype: str = "float32"
    activations: Sequence[str] = ("exact",)
    pythons: Mapping[str, str] = field(default_factory=dict)
    without_bf16: bool = False

    def __post_init__(self) -> None:
        for name, least in (("prompt", 1), ("new", 2), ("repeats", 1), ("threads", 1)):
            if getattr(self, name) < least:
                raise RequestError(f"{name} is {getattr(self, name)}; legal is at least {least}")
        for peer in (*self.against, *self.pythons):
            if peer not in PEERS:
                raise RequestError(f"there is no peer {peer!r}; there are {', '.join(PEERS)}")
        if not self.activations:
            raise RequestError(f"no activations are named; legal are {' and '.join(ACTIVATIONS)}")
        for kind in self.activations:
            if kind not in ACTIVATIONS:
                raise RequestError(f"activations are {kind!r}; legal are {' and '.join(ACTIVATIONS)}")
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise RequestError(f"dtype is {self.dtype!r}; legal are float32, float16 and bfloat16")


@dataclass
class _Lane:
    """A program in the making."""

    label: str
    tool: str
    source: str
    python: str
    activations: str = "exact"
    versions: dict[str, str] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)


def measure(request: Request, progress: Progress = SILENT) -> Speed:
    """Run everything in turn, `repeats` times.

    A peer that is not installed, or that cannot run the model, is left out and named in `notes`.

    Raises:
        RequestError: neoquant itself cannot run the model, a peer needs `base`, or the context is too short.
    """
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="neoquant-bench-") as temp:
        lanes = [lane for lane in _lanes(request) if _is_ready(lane, Path(temp), notes)]
        with progress.task("running", total=request.repeats * len(lanes)) as advance:
            for repeat in range(request.repeats):
                # The order alternates, so that no program always runs behind the same neighbour.
                for lane in lanes[:] if repeat % 2 == 0 else lanes[::-1]:
                    job = {"step": "run", "tool": lane.tool, "source": lane.source, "threads": request.threads}
                    job |= {"prompt": request.prompt, "new": request.new, "dtype": request.dtype}
                    job |= {"activations": lane.activations}
                    try:
                        lane.runs.append(Run(**_child(lane, job, request.threads)))
                    except RequestError as error:
                        if lane.tool == "neoquant":
                            raise
                        notes.append(f"{error}; left out")
                        lanes.remove(lane)
                    advance(1)
    return Speed(
        prompt_tokens=request.prompt,
        new_tokens=request.new,
        repeats=request.repeats,
        threads=request.threads,
        dtype=request.dtype,
        programs=[_program(lane) for lane in lanes],
        notes=notes,
    )


def _lanes(request: Request) -> list[_Lane]:
    """Who runs what. transformers runs the plain model, and quantized ones as well where it reads their format."""
    lanes, readable, unread = [], [], ""
    plain = None if request.base is None else str(demo.resolve(request.base))
    for model in map(str, map(demo.resolve, request.models)):
        with open_checkpoint(model, headers_only=True) as checkpoint:
            format = detect(checkpoint.config, checkpoint.headers)
            limit = int(checkpoint.config.get("max_position_embeddings", 2048))
        if request.prompt + request.new > limit:
            raise RequestError(f"{request.prompt} + {request.new} tokens; the context of {model} is {limit}")
        name = Path(model).resolve().name if Path(model).exists() else model
        for kind in dict.fromkeys(request.activations):
            label = f"neoquant: {name}" + ("" if kind == "exact" else f", {kind} activations")
            if kind == "exact" or format is not None:
                lanes.append(_Lane(label, "neoquant", model, sys.executable, kind))
            elif set(request.activations) == {kind}:
                raise RequestError(f"no weight of {name} is quantized, so that {kind} activations would meet none")
        if format is None:
            plain = plain or model
        elif format.family == "bitsandbytes":
            readable.append((name, model))
        else:
            unread = format.name
    for peer in request.against:
        python = request.pythons.get(peer, sys.executable)
        if peer == "transformers":
            for name, model in readable:
                lanes.append(_Lane(f"transformers + bitsandbytes: {name}", "bitsandbytes", model, python))
                if request.without_bf16:
                    label = f"transformers + bitsandbytes without bf16 instructions: {name}"
                    lanes.append(_Lane(label, "bitsandbytes-without-bf16", model, python))
        if plain is not None:
            how = "int4" if peer == "openvino" else request.dtype
            lanes.append(_Lane(f"{peer}: {how}", peer, plain, python))
        elif peer != "transformers" or not readable:
            raise RequestError(f"{peer} does not read the format {unread or 'bnb4'}: name the plain model as the base")
    return lanes


def _is_ready(lane: _Lane, temp: Path, notes: list[str]) -> bool:
    """Whether the lane's program is there; OpenVINO's model is made here. What is missing is added to `notes`."""
    found = _child(lane, {"step": "check", "tool": lane.tool}, 1)
    if found["missing"]:
        notes.append(f"{lane.label}: left out, for {lane.python} has no {', '.join(found['missing'])}")
        return False
    lane.versions = found["versions"]
    if lane.tool == "openvino":
        made = str(temp / "openvino")
        try:
            _child(lane, {"step": "export", "source": lane.source, "out": made}, os.cpu_count() or 1)
        except RequestError as error:
            notes.append(f"{error}; left out")
            return False
        lane.source = made
    return True


def _child(lane: _Lane, job: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """One step in a process of its own."""
    paths = [str(Path(__file__).parents[2])] if lane.tool == "neoquant" else []
    paths += filter(None, [os.environ.get("PYTHONPATH")] if lane.python == sys.executable else [])
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(paths)}
    command = [lane.python, str(RUNNER), json.dumps(job)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    except OSError as error:
        raise RequestError(f"{lane.python} cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RequestError(f"{lane.label} failed: {said[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _program(lane: _Lane) -> Program:
    median = {name: statistics.median(getattr(run, name) for run in lane.runs) for name in Run.model_fields}
    source = Path(lane.source).name
    return Program(
        label=lane.label, tool=lane.tool, source=source, versions=lane.versions, runs=lane.runs, median=Run(**median)
    )
