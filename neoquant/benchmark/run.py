"""How fast a model runs and what memory it takes, beside other programs: each run in a process of its own, in turn."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from neoquant import demo
from neoquant.checkpoint import open_checkpoint
from neoquant.errors import RequestError, locate
from neoquant.evaluation.result import Record
from neoquant.files.names import short_name
from neoquant.formats import Format, detect
from neoquant.kernels import ACTIVATIONS
from neoquant.model.cache import require_storage
from neoquant.model.config import GPTNeoConfig
from neoquant.model.devices import device_name, resolve_device
from neoquant.progress import SILENT, Progress

WORKER = Path(__file__).with_name("worker.py")
PEERS = ("transformers", "openvino")


class Run(Record):
    """One process: seconds, tokens per second, bytes."""

    import_s: float
    load_s: float
    prefill_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    peak_rss_bytes: float
    peak_device_bytes: float = 0
    """Of a GPU's memory; 0 on the CPU."""

    @property
    def peak_bytes(self) -> float:
        """Of the memory that the model lies in."""
        return self.peak_device_bytes or self.peak_rss_bytes


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
    batch: int = 1
    cache: str | None = None  # the type that neoquant holds keys and values in; None: as they are computed
    device: str = "cpu"  # or the card's name
    static_cache: bool = False
    programs: list[Program]
    notes: list[str]


@dataclass(frozen=True)
class Request:
    """What to measure: `models`, folders or hub ids. `base` is the plain model, for peers that read none of these.

    `batch` prompts are read and continued together, and rates count the tokens of all; `cache` is the type that
    neoquant holds keys and values in, and `static_cache` has it replay CUDA graphs. `device` is the CPU or a GPU.
    `activations`: "exact", "int8" or both; every quantized model runs with each of them.
    `pythons`: peer -> the interpreter that has it, where that is not this one.
    `without_bf16`: whether transformers runs bitsandbytes' weights once more as on a CPU without bf16 instructions,
    which bitsandbytes' fused product needs; without them it decodes the weight for each product.
    """

    models: Sequence[str]
    against: Sequence[str] = ()
    base: str | None = None
    prompt: int = 128
    new: int = 64
    repeats: int = 3
    threads: int = 1
    dtype: str = "float32"
    batch: int = 1
    cache: str | None = None
    device: str = "cpu"
    static_cache: bool = False
    activations: Sequence[str] = ("exact",)
    pythons: Mapping[str, str] = field(default_factory=dict)
    without_bf16: bool = False

    def __post_init__(self) -> None:
        for name, what, least in (
            ("prompt", "prompt tokens", 1),
            ("new", "new tokens", 2),
            ("repeats", "repeats", 1),
            ("threads", "threads", 1),
            ("batch", "prompts together", 1),
        ):
            if (count := getattr(self, name)) < least:
                raise RequestError(f"{what}: {count}; legal is at least {least}")
        for peer in (*self.against, *self.pythons):
            if peer not in PEERS:
                raise RequestError(f"there is no peer {peer!r}; there are {', '.join(PEERS)}")
        require_storage(self.cache)
        if resolve_device(self.device).type != "cpu" and "openvino" in self.against:
            raise RequestError(f"openvino is measured on the CPU, not on {self.device}: leave it out")
        if not self.activations:
            raise RequestError(f"no activations are named; legal are {' and '.join(ACTIVATIONS)}")
        for kind in self.activations:
            if kind not in ACTIVATIONS:
                raise RequestError(f"activations are {kind!r}; legal are {' and '.join(ACTIVATIONS)}")
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise RequestError(f"dtype is {self.dtype!r}; legal are float32, float16 and bfloat16")


@dataclass
class _Target:
    """A program on a model, and its runs so far."""

    label: str
    tool: str
    source: str
    python: str
    activations: str = "exact"
    versions: dict[str, str] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)

    def summary(self) -> Program:
        median = {name: statistics.median(getattr(run, name) for run in self.runs) for name in Run.model_fields}
        return Program(
            label=self.label,
            tool=self.tool,
            source=short_name(self.source),
            versions=self.versions,
            runs=self.runs,
            median=Run(**median),
        )


class _Model(NamedTuple):
    """A model to measure, and the format of its weights; None: it is not quantized."""

    source: str
    name: str
    format: Format | None


def measure(request: Request, progress: Progress = SILENT) -> Speed:
    """Run everything in turn, `repeats` times.

    A peer that is not installed, or that cannot run the model, is left out and named in `notes`.

    Raises:
        RequestError: neoquant itself cannot run the model, a peer needs `base`, or the context is too short.
    """
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="neoquant-bench-") as temp:
        targets = [target for target in _targets(request) if _is_ready(target, Path(temp), notes)]
        with progress.task("running", total=request.repeats * len(targets)) as advance:
            for repeat in range(request.repeats):
                # The order alternates, so that no program always runs after the same one.
                for target in targets[:] if repeat % 2 == 0 else targets[::-1]:
                    try:
                        target.runs.append(_run(target, request))
                    except RequestError as error:
                        if target.tool == "neoquant":
                            raise
                        notes.append(f"{error}; left out")
                        targets.remove(target)
                    advance(1)
    return Speed(
        prompt_tokens=request.prompt,
        new_tokens=request.new,
        repeats=request.repeats,
        threads=request.threads,
        dtype=request.dtype,
        batch=request.batch,
        cache=request.cache,
        device=device_name(resolve_device(request.device)),
        static_cache=request.static_cache,
        programs=[target.summary() for target in targets],
        notes=notes,
    )


def _targets(request: Request) -> list[_Target]:
    models = [_inspect_model(str(demo.resolve(model)), request) for model in request.models]
    peers = [target for peer in request.against for target in _peer_targets(peer, models, request)]
    return [target for model in models for target in _own_targets(model, request)] + peers


def _inspect_model(source: str, request: Request) -> _Model:
    """Read the model's headers. Raises RequestError where its context is too short."""
    with open_checkpoint(source, headers_only=True) as checkpoint:
        format = detect(checkpoint.config, checkpoint.headers)
        with locate(f"{source}/config.json"):
            limit = GPTNeoConfig.from_dict(checkpoint.config).max_position_embeddings
    if request.prompt + request.new > limit:
        raise RequestError(f"{request.prompt} + {request.new} tokens; the context of {source} is {limit}")
    return _Model(source, Path(source).resolve().name if Path(source).exists() else source, format)


def _own_targets(model: _Model, request: Request) -> Iterator[_Target]:
    """neoquant on a model; rounded activations are for quantized weights only."""
    for kind in dict.fromkeys(request.activations):
        label = f"neoquant: {model.name}" + ("" if kind == "exact" else f", {kind} activations")
        if kind == "exact" or model.format is not None:
            yield _Target(label, "neoquant", model.source, sys.executable, kind)
        elif set(request.activations) == {kind}:
            raise RequestError(f"no weight of {model.name} is quantized, so that {kind} activations would meet none")


def _peer_targets(peer: str, models: Sequence[_Model], request: Request) -> Iterator[_Target]:
    """A peer on the plain model; transformers runs bitsandbytes' formats as well."""
    python = request.pythons.get(peer, sys.executable)
    readable = [model for model in models if model.format is not None and model.format.family == "bitsandbytes"]
    for model in readable if peer == "transformers" else []:
        yield _Target(f"transformers + bitsandbytes: {model.name}", "bitsandbytes", model.source, python)
        if request.without_bf16:
            label = f"transformers + bitsandbytes without bf16 instructions: {model.name}"
            yield _Target(label, "bitsandbytes-without-bf16", model.source, python)
    plain = next((model.source for model in models if model.format is None), None)
    if request.base is not None:
        plain = str(demo.resolve(request.base))
    if plain is not None:
        weights = "int4" if peer == "openvino" else request.dtype
        yield _Target(f"{peer}: {weights}", peer, plain, python)
    elif peer != "transformers" or not readable:
        unread = [model.format.name for model in models if model.format is not None and model not in readable]
        raise RequestError(
            f"{peer} does not read the format {unread[-1] if unread else 'bnb4'}: name the plain model as the base"
        )


def _is_ready(target: _Target, temp: Path, notes: list[str]) -> bool:
    """Whether the program is installed; OpenVINO's model is exported here. What is missing is added to `notes`."""
    found = _call_worker(target, {"step": "check", "tool": target.tool}, 1)
    if found["missing"]:
        notes.append(f"{target.label}: left out, for {target.python} has no {', '.join(found['missing'])}")
        return False
    target.versions = found["versions"]
    if target.tool == "openvino":
        exported = str(temp / "openvino")
        try:
            _call_worker(target, {"step": "export", "source": target.source, "out": exported}, os.cpu_count() or 1)
        except RequestError as error:
            notes.append(f"{error}; left out")
            return False
        target.source = exported
    return True


def _run(target: _Target, request: Request) -> Run:
    job = {"step": "run", "tool": target.tool, "source": target.source, "threads": request.threads}
    job |= {"prompt": request.prompt, "new": request.new, "dtype": request.dtype, "activations": target.activations}
    job |= {"batch": request.batch, "cache": request.cache, "device": str(resolve_device(request.device))}
    job |= {"static_cache": request.static_cache}
    return Run(**_call_worker(target, job, request.threads))


def _call_worker(target: _Target, job: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """One step of `worker.py` in a process of its own."""
    paths = [str(Path(__file__).parents[2])] if target.tool == "neoquant" else []
    paths += filter(None, [os.environ.get("PYTHONPATH")] if target.python == sys.executable else [])
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(paths)}
    command = [target.python, str(WORKER), json.dumps(job)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    except OSError as error:
        raise RequestError(f"{target.python} cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RequestError(f"{target.label} failed: {lines[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
