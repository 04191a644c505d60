"""Files damaged at random: every command ends well, or with one line that says why, and leaves nothing half-made.

Every case is a file of one kind, damaged by a seed, and a command that reads it. `NEOQUANT_HOSTILE_CASES=20000` runs
more than the 1,000 of an ordinary run; `NEOQUANT_HOSTILE_SEED` begins elsewhere. What a failure names as its seed, a
kind and a number, makes the same damage again. Damage is not guided by coverage: where that was tried, 120 guided cases
reached 49 new lines of neoquant, and 120 random ones 51.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import Cli, Result, write_tiny_model
from mutations import (
    Mutator,
    mutated_bytes,
    mutated_json,
    mutated_safetensors,
    mutated_toml,
)
from results import SUBSETS, make_candidate, make_comparison, make_evaluation, make_inspection
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from neoquant.evaluation.result import Evaluation, UnitScore

CASES = int(os.environ.get("NEOQUANT_HOSTILE_CASES", "1000"))
SEED = int(os.environ.get("NEOQUANT_HOSTILE_SEED", "0"))
SECONDS = 10.0
MEMORY = 600_000_000  # bytes that one command may add to what the process has held

RECIPE = b"""name = "mixed"
format = "auto"
dtype = "auto"
embeddings = "auto"

[[rules]]
match = "transformer.h.0.*"
keep = true

[[rules]]
match = "*"
bits = 4
type = "nf4"
block_size = 64
double_quant = true
quantizer = "nearest"
"""
SUITE = b"""name = "mine"
description = "texts"
protocol = "strided"
context = 16
stride = 8
subsets = ["one"]
documents = 2
characters = 100
[data]
kind = "file"
path = "texts.jsonl"
"""
SWEEP = b"""models = ["model"]
suites = ["suite.toml"]
documents = 2
context = 16
[recipes]
nf4 = "--bits 4 --type nf4"
gptq3 = "--bits 3 --type gptq --group-size 16 --calibration texts.jsonl"
"""
TEXTS = b'{"text": "some words to be read", "meta": {"pile_set_name": "one"}}\n' * 3


class Kind(NamedTuple):
    """A file, how it is damaged, and commands that read it (in the folder where it lies)."""

    file: str
    mutate: Mutator
    commands: tuple[str, ...]


EVAL = "eval model --data texts.jsonl --context 16 --json out.json"
GENERATE = "generate model --prompt word --max-new-tokens 3 --greedy"
QUANTIZE, DEQUANTIZE = "quantize model --out out", "convert nf4 --dequantize --out out"
OF_GPTQ = ("info gptq", DEQUANTIZE.replace("nf4", "gptq"), GENERATE.replace("model", "gptq"))
REPORT, RECIPED = "report comparison.json", "--recipe recipe.toml"
KINDS = {
    "config": Kind("model/config.json", mutated_json, ("info model", "plan model", GENERATE, QUANTIZE)),
    "header": Kind("model/model.safetensors", mutated_safetensors, ("info model", QUANTIZE, GENERATE)),
    "quantized config": Kind("nf4/config.json", mutated_json, ("info nf4", DEQUANTIZE)),
    "quantized header": Kind("nf4/model.safetensors", mutated_safetensors, ("info nf4", DEQUANTIZE)),
    "GPTQ's config": Kind("gptq/config.json", mutated_json, OF_GPTQ),
    "GPTQ's header": Kind("gptq/model.safetensors", mutated_safetensors, OF_GPTQ),
    "record": Kind("nf4/neoquant.json", mutated_json, ("info nf4", "convert nf4 --to neoquant --out out")),
    "index": Kind("sharded/model.safetensors.index.json", mutated_json, ("info sharded", "quantize sharded --out out")),
    "tokenizer": Kind("model/tokenizer.json", mutated_json, (GENERATE, EVAL)),
    "tokenizer settings": Kind("model/tokenizer_config.json", mutated_json, (GENERATE, EVAL)),
    "generation settings": Kind("model/generation_config.json", mutated_json, (GENERATE,)),
    "recipe": Kind(
        "recipe.toml", mutated_toml, ("plan model --recipe recipe.toml", f"{QUANTIZE} --recipe recipe.toml")
    ),
    "suite": Kind("suite.toml", mutated_toml, ("eval model --suite suite.toml --json out.json",)),
    "sweep": Kind("sweep.toml", mutated_toml, ("sweep sweep.toml --out swept",)),
    "result": Kind("comparison.json", mutated_json, (f"{REPORT} --html out.html", "compare comparison.json")),
    "evaluation": Kind("evaluation.json", mutated_json, ("compare evaluation.json other.json --json out.json",)),
    "inspection": Kind("inspection.json", mutated_json, (f"{REPORT} inspection.json --markdown out.md",)),
    "data": Kind("texts.jsonl", mutated_bytes, (EVAL,)),
    "compressed data": Kind("texts.jsonl.zst", mutated_bytes, (EVAL.replace("texts.jsonl", "texts.jsonl.zst"),)),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sound file of every kind."""
    import zstandard

    from neoquant.quantization.quantize import quantize
    from neoquant.quantization.recipe import Recipe

    folder = tmp_path_factory.mktemp("sound")
    model = write_tiny_model(folder / "model")
    quantize(model, folder / "nf4", Recipe.simple())
    wide = write_tiny_model(folder / "wide", hidden_size=32, num_heads=4)
    quantize(wide, folder / "gptq", Recipe.simple(4, "affine", group_size=16, symmetric=True, format="gptq"))
    shutil.rmtree(wide)
    shutil.copytree(model, folder / "sharded")
    (folder / "sharded" / "model.safetensors").unlink()
    write_shards(folder / "sharded", load_file(model / "model.safetensors"))
    for name, content in (("recipe", RECIPE), ("suite", SUITE), ("sweep", SWEEP)):
        (folder / f"{name}.toml").write_bytes(content)
    (folder / "texts.jsonl").write_bytes(TEXTS)
    (folder / "texts.jsonl.zst").write_bytes(zstandard.compress(TEXTS * 50))
    comparison = make_comparison(make_candidate("model-nf4"), base="model")
    inspection = make_inspection("model-nf4", "model")
    results = {"comparison": comparison, "inspection": inspection, "evaluation": scored("model", 30.0)}
    for name, result in (results | {"other": scored("other", 31.0)}).items():
        (folder / f"{name}.json").write_text(result.to_json())
    return folder


def scored(name: str, nats: float) -> Evaluation:
    """An evaluation of four documents."""
    units = tuple(
        UnitScore(id=f"line {number}", subset=SUBSETS[number % 2], tokens=9, bytes=30, nats=nats + number)
        for number in range(4)
    )
    return make_evaluation(name).model_copy(update={"units": units})


def write_shards(folder: Path, tensors: dict[str, Any]) -> None:
    import json

    files = {}
    for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        files |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


class Hang(BaseException):
    """A command took too long."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fault_of(result: Result, seconds: float, grown: int) -> str | None:
    """What is wrong with the end of a command; None if nothing is."""
    lines = result.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if result.code not in (0, 1, 2, 3):
        return f"exit code {result.code}"
    if "this is a bug" in result.err or "Traceback" in result.err:
        return "a bug"
    if result.code in (1, 2) and (len(errors) != 1 or lines[-1] != errors[0]):
        return f"{len(errors)} lines of error"
    if result.code == 0 and errors:
        return "an error, and success"
    if any(ord(c) < 32 and c not in "\n\t" for c in result.err + result.out):
        return "control characters"
    if seconds > SECONDS:
        return f"{seconds:.1f} seconds"
    return f"{grown / 1e6:.0f} MB" if grown > MEMORY else None


def leftover(before: set[str], code: int) -> str | None:
    """What a command left that it should not have: anything but whole outputs."""
    new = {path.name for path in Path.cwd().iterdir()} - before
    if wrong := {name for name in new if name not in ("out", "out.json", "out.html", "out.md", "swept")}:
        return f"left {wrong}"
    if Path("out").exists():
        if code:
            return "failed, and left a folder"
        for file in Path("out").glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                list(opened.keys())
    return None


@pytest.mark.parametrize("name", KINDS)
def test_damaged_at_random(name: str, sound: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kind = KINDS[name]
    monkeypatch.setattr("neoquant.cli.sweep._sweep_model", lambda *_: iter(()))  # what it runs are other verbs
    source, work = sound / kind.file, tmp_path / "work"
    shutil.copytree(sound, work)
    monkeypatch.chdir(work)
    before = {path.name for path in work.iterdir()}
    content, faults, refused = source.read_bytes(), [], 0
    for number in range(-(-CASES // len(KINDS))):
        seed = f"{name} {SEED + number}"
        chance = random.Random(seed)
        (work / kind.file).write_bytes(kind.mutate(content, chance))
        command = chance.choice(kind.commands)
        result, seconds, grown = timed(cli, command)
        fault = fault_of(result, seconds, grown) or leftover(before, result.code)
        if fault:
            faults.append(f"seed {seed!r}, {command}: {fault}: {result.err[-300:]!r}")
        refused += result.code != 0
        for path in work.iterdir():
            if path.name not in before:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not faults, f"{len(faults)} faults\n" + "\n".join(faults[:12])
    assert refused or name == "record", "no damage was found"  # what a record says is not needed


def timed(cli: Callable[..., Result], command: str) -> tuple[Result, float, int]:
    started, memory = time.process_time(), resident_bytes()  # other processes of a busy machine do not count
    try:
        with time_limit(12 * SECONDS):
            result = cli(*command.split())
    except Hang:
        result = Result(-1, "", "hangs")
    return result, time.process_time() - started, resident_bytes() - memory
