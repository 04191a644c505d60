"""Calibrated runs that are ended and go on: killed anywhere, by Ctrl-C, changed, damaged, twice at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli, write_tiny_model

from neoquant.calibration.dataset import Calibration
from neoquant.calibration.memory import estimate_memory
from neoquant.data.fingerprints import hash_texts
from neoquant.errors import OutputError, RequestError
from neoquant.model.config import GPTNeoConfig
from neoquant.progress import Progress
from neoquant.quantization.quantize import quantize
from neoquant.quantization.recipe import Recipe
from neoquant.quantization.resume import ResumableRun

RECIPE = Recipe.simple(3, "affine", group_size=16, quantizer="gptq", objective="attention", correction=0.0)
FOR_LOSS = Recipe.simple(3, "affine", group_size=16, quantizer="gptq", objective="model", correction=0.5)
SHAPE: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 16,
    "num_heads": 2,
    "attention_types": [[["global", "local", "global"], 1]],
    "attention_layers": ["global", "local", "global"],
}

# Kills itself at its k-th call of what changes or reads kept files, for many k until a run gets to its end; after each,
# runs again to the end. Says how many blocks each second run found finished.
DRIVER = """
import json, os, pathlib, signal, sys
model, work = map(pathlib.Path, sys.argv[1:3])
sys.path[:0] = json.loads(os.environ["TEST_PATHS"])
import torch
from test_resume import calibration, RECIPE, FOR_LOSS
from neoquant.quantization.quantize import quantize

recipe, step = {"attention": RECIPE, "model": FOR_LOSS}[sys.argv[3]], int(sys.argv[4])


def run(out, kill_at):
    calls = 0
    def counted(function):
        def call(*args, **named):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **named)
        return call
    os.fsync, os.rename, os.unlink = counted(os.fsync), counted(os.rename), counted(os.unlink)
    os.preadv, os.replace = counted(os.preadv), counted(os.replace)
    quantize(model, out, recipe, calibration=calibration())

k, found = 0, []
while True:
    k += 1 if k < 3 else step
    out = work / str(k) / "out"
    child = os.fork()
    if not child:
        run(out, k)
        os._exit(0)
    killed = os.waitpid(child, 0)[1] != 0
    if not killed:
        break
    kept = out.with_name(".out.unfinished")
    found.append(len(list(kept.glob("block-*.safetensors"))) if kept.exists() else 0)
    quantize(model, out, recipe, calibration=calibration(), force=out.exists())
print(json.dumps(found))
"""


def calibration(seed: int = 0, rows: int = 5) -> Calibration:
    ids = torch.randint(0, 200, (rows, 24), generator=torch.Generator().manual_seed(seed))
    return Calibration(ids, "made up", hash_texts(["made up"]), 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("unfinished") / "plain", **SHAPE)


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return contents(quantize(model, tmp_path_factory.mktemp("done") / "out", RECIPE, calibration=calibration()).folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Stop(Progress):
    """Ends a run after some blocks."""

    def __init__(self, blocks: int, how: type[BaseException] = KeyboardInterrupt, label: str = "calibrating") -> None:
        self.left, self.how, self.label, self.notes = blocks, how, label, list[str]()

    @contextmanager
    def task(self, label: str, total: float | None) -> Iterator[Any]:
        def advance(amount: float) -> None:
            if label == self.label:
                self.left -= int(amount)
                if self.left <= 0:
                    raise self.how

        yield advance

    def note(self, text: str) -> None:
        self.notes.append(text)


def stop_after(blocks: int, model: Path, out: Path, **named: Any) -> None:
    with pytest.raises(KeyboardInterrupt, match=f"after block {blocks} of 3: the same command resumes"):
        quantize(model, out, RECIPE, calibration=calibration(), progress=Stop(blocks), **named)
    assert not out.exists() and (out.parent / f".{out.name}.unfinished").is_dir()


@pytest.mark.parametrize(("recipe", "step"), [(RECIPE, 4), (FOR_LOSS, 9)], ids=["attention", "model"])
def test_killed_anywhere_it_goes_on_to_the_same_bytes(model: Path, recipe: Recipe, step: int, tmp_path: Path) -> None:
    undisturbed = contents(quantize(model, tmp_path / "0" / "out", recipe, calibration=calibration()).folder)
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(model), str(tmp_path), recipe.rules[0].options["objective"], str(step)],
        env=os.environ | {"TEST_PATHS": json.dumps(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) > 10 and set(found) == {0, 1, 2, 3}
    assert len(list(tmp_path.iterdir())) == len(found) + 2
    for folder in tmp_path.iterdir():
        assert [path.name for path in folder.iterdir()] == ["out"]
        assert contents(folder / "out") == undisturbed, folder


def test_interrupted_it_goes_on_and_says_so(model: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    stop_after(1, model, tmp_path / "out")
    stop_after(2, model, tmp_path / "out")  # of the three, one of which was finished
    told = Stop(9)
    made = quantize(model, tmp_path / "out", RECIPE, calibration=calibration(), progress=told)
    assert told.notes == ["resuming after block 2 of 3"]
    assert contents(made.folder) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("correction", [0.5, 0.0])
def test_interrupted_before_the_first_block_it_goes_on(correction: float, model: Path, tmp_path: Path) -> None:
    """What blocks see is kept until they are quantized, if they are corrected by it; else until gradients passed."""
    options = {"objective": "model", "correction": correction}
    recipe = Recipe.simple(3, "affine", group_size=16, quantizer="gptq", **options)
    expected = contents(quantize(model, tmp_path / "2" / "out", recipe, calibration=calibration()).folder)
    kept = []
    for steps in (2, 3, 4, 5):  # of the three blocks, forwards, then back
        with pytest.raises(KeyboardInterrupt, match="through the unquantized model: the same command resumes there"):
            quantize(
                model, tmp_path / "out", recipe, calibration=calibration(), progress=Stop(steps, label="gradients")
            )
        kept.append({path.name.rpartition("-")[0] for path in (tmp_path / ".out.unfinished").glob("*-*")})
    counts = (3, 4, 4, 4) if correction else (3, 4, 3, 2)
    inputs = [{f"input-{number}" for number in range(count)} for count in counts]
    if correction:  # and what is behind attention
        inputs = [found | {f"behind-{number}" for number in range(len(found) - 1)} for found in inputs]
    assert kept == [
        inputs[0],
        inputs[1],
        inputs[2] | {"gradient-2", "curvature-2"},
        inputs[3] | {"gradient-1", "curvature-1", "curvature-2"},
    ]
    made = quantize(model, tmp_path / "out", recipe, calibration=calibration())
    assert contents(made.folder) == expected and not (tmp_path / ".out.unfinished").exists()


def test_an_error_before_the_first_block_leaves_nothing(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        quantize(model, tmp_path / "out", RECIPE, calibration=calibration(), progress=Stop(0, RuntimeError))
    assert not any(tmp_path.iterdir())


def test_what_a_recipe_leaves_to_defaults_is_part_of_the_request(model: Path, tmp_path: Path) -> None:
    stop_after(1, model, tmp_path / "out")
    run = tmp_path / ".out.unfinished" / "run.json"
    found = json.loads(run.read_text())
    changed = [{**each, "damping": 0.5} if each["name"] == "gptq" else each for each in found["quantizers"]]
    for quantizers, difference in (
        (changed, r"quantizers \d.damping was 0.5, now 0.01"),
        (None, "quantizers was not stated, now"),  # as before it was written down
    ):
        run.write_text(json.dumps({**found, "quantizers": quantizers}))
        with pytest.raises(RequestError, match=difference):
            quantize(model, tmp_path / "out", RECIPE, calibration=calibration())


def test_another_request_is_refused(model: Path, tmp_path: Path) -> None:
    stop_after(1, model, tmp_path / "out")
    other = Recipe.simple(3, "affine", group_size=32, quantizer="gptq")
    changed = write_tiny_model(tmp_path / "changed", seed=1, **SHAPE)
    window = write_tiny_model(tmp_path / "window", **SHAPE, window_size=5)
    for source, recipe, shown, difference in (
        (model, other, calibration(), "recipe.rules 1.group_size was 16, now 32"),
        (model, RECIPE, calibration(seed=1), 'calibration.tokens was "'),
        (model, RECIPE, calibration(rows=6), "calibration.rows was 5, now 6"),
        (changed, RECIPE, calibration(), 'model.tensors was "'),
        (window, RECIPE, calibration(), 'model.config was "'),
        (model, Recipe.simple(), None, "another request (a calibrated one)"),
    ):
        with pytest.raises(RequestError, match=r"unfinished run of another request .*drop it with --restart") as error:
            quantize(source, tmp_path / "out", recipe, calibration=shown)
        assert difference in str(error.value)
        assert (tmp_path / ".out.unfinished" / "run.json").exists()
    expected = quantize(model, tmp_path / "2" / "out", other, calibration=calibration()).folder
    made = quantize(model, tmp_path / "out", other, calibration=calibration(), restart=True)
    assert contents(made.folder) == contents(expected)
    stop_after(1, model, tmp_path / "3")
    quantize(model, tmp_path / "3", Recipe.simple(), restart=True)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_damage_is_recognized(model: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    kept = tmp_path / ".out.unfinished"
    stop_after(2, model, tmp_path / "out")
    names = sorted(path.name for path in kept.iterdir())
    assert [name.split("-")[0] for name in names] == ["block", "block", "hidden", "run.json"]
    for name in names:
        whole = (kept / name).read_bytes()
        flipped = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
        for content in (
            b"",
            whole[:-1],
            b"{" if name == "run.json" else flipped,
            whole + b" " if "-" in name else b"[",
        ):
            (kept / name).write_bytes(content)
            with pytest.raises(OutputError, match=r"is damaged or missing.*--restart"):
                quantize(model, tmp_path / "out", RECIPE, calibration=calibration())
            assert not (tmp_path / "out").exists()
        (kept / name).write_bytes(whole)
    next(kept.glob("hidden-*")).unlink()
    with pytest.raises(OutputError, match="hidden-2 is damaged or missing"):
        quantize(model, tmp_path / "out", RECIPE, calibration=calibration())
    made = quantize(model, tmp_path / "out", RECIPE, calibration=calibration(), restart=True)
    assert contents(made.folder) == undisturbed and not kept.exists()


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("name", ["photos/one.jpg", "thesis.tex", "block-1.safetensors"])
def test_a_folder_that_is_not_a_runs_is_left_alone(model: Path, tmp_path: Path, name: str, restart: bool) -> None:
    kept = tmp_path / ".out.unfinished"
    for path in (kept / "run.json", kept / name):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    for recipe, texts in ((RECIPE, calibration()), (Recipe.simple(), None)):
        with pytest.raises(OutputError, match=f"holds {name.split('/')[0]}, which is no part of an unfinished run"):
            quantize(model, tmp_path / "out", recipe, calibration=texts, restart=restart)
        assert (kept / "run.json").read_text() == (kept / name).read_text() == "mine"
        assert not (tmp_path / "out").exists()


def test_two_at_once_are_refused(model: Path, tmp_path: Path) -> None:
    with ResumableRun(tmp_path / "out"):
        with pytest.raises(OutputError, match="out is being made by another process"):
            quantize(model, tmp_path / "out", RECIPE, calibration=calibration())
        quantize(model, tmp_path / "2", RECIPE, calibration=calibration())
    quantize(model, tmp_path / "out", RECIPE, calibration=calibration())


def test_the_command_line_goes_on(cli: Cli, model: Path, tmp_path: Path, text_file: Path) -> None:
    words = ("--bits", 3, "--type", "gptq", "--group-size", 16, "--calibration", text_file, "--rows", 3, "--length", 9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neoquant.cli.terminal.Notes.task", Stop(1).task)
        ended = cli("quantize", model, *words, "--out", tmp_path / "out")
    assert ended.code == 130
    assert ended.error == ("interrupted after block 1 of 3: the same command resumes there, --restart starts again")
    refused = cli("quantize", model, *words, "--symmetric", "--out", tmp_path / "out")
    assert refused.code == 2 and "rules 1.symmetric was not stated, now true" in refused.error
    done = cli("quantize", model, *words, "--out", tmp_path / "out")
    assert done.code == 0 and "resuming after block 1 of 3" in done.err


def test_on_disk_is_in_memory(model: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    config = GPTNeoConfig.from_pretrained(model)
    plenty = estimate_memory(config, 5, 24).memory
    little = estimate_memory(config, 5, 24, plenty - 1).memory
    assert little < plenty
    with pytest.raises(RequestError, match=r"calibrating needs about 300\.3 MB for one block, more than the 1\.0 KB"):
        quantize(model, tmp_path / "out", RECIPE, calibration=calibration(), max_memory=1000)
    stop_after(1, model, tmp_path / "out", max_memory=little)
    assert [path.name.split("-")[0] for path in sorted((tmp_path / ".out.unfinished").iterdir())] == [
        "block", "hidden", "run.json"
    ]  # fmt: skip
    stop_after(2, model, tmp_path / "out")  # a limit may change on the way
    made = quantize(model, tmp_path / "out", RECIPE, calibration=calibration(), max_memory=little)
    assert contents(made.folder) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
