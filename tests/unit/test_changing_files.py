"""Files that change under the program, and programs that end under files."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import Cli
from safetensors.torch import load_file

from neoquant import demo
from neoquant.checkpoint import open_checkpoint, writer
from neoquant.checkpoint.writer import CheckpointWriter
from neoquant.errors import CheckpointError, OutputError
from neoquant.files.exchanging import exchange
from neoquant.files.locks import claim
from neoquant.quantization.quantize import quantize
from neoquant.quantization.recipe import Recipe

LARGE = "transformer.wte.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo.MODEL, tmp_path / "source"))


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


@pytest.mark.parametrize("viewed_before", [False, True])
def test_a_file_that_was_cut_short_is_an_error(source: Path, viewed_before: bool) -> None:
    with open_checkpoint(source) as checkpoint:
        last = max(checkpoint.headers, key=lambda name: checkpoint._stored[name].place.begin)
        if viewed_before:
            checkpoint.view(LARGE)  # the file is mapped
        os.truncate(weights(source), weights(source).stat().st_size - 1)
        with pytest.raises(CheckpointError, match=r"model\.safetensors.* (ends 1 byte before the end|cut short)"):
            checkpoint.view(last)
        with pytest.raises(CheckpointError, match=r"model\.safetensors.* was changed by another program"):
            checkpoint.require_unchanged()


def rewrite(path: Path) -> None:
    """Other bytes, as many, in place."""
    with path.open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(bytes(4096))


def replace(path: Path) -> None:
    """Another file of the same bytes and time, under that name."""
    other = path.with_name("other")
    shutil.copy2(path, other)
    other.replace(path)


@pytest.mark.parametrize("change", [rewrite, replace, lambda path: os.truncate(path, path.stat().st_size - 1)])
@pytest.mark.parametrize("when", [0, 20])
def test_what_was_read_of_two_versions_is_not_written(
    source: Path, change: object, when: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = 0, CheckpointWriter.put

    def put(self: CheckpointWriter, name: str, tensor: torch.Tensor) -> None:
        nonlocal calls
        if calls == when:
            change(weights(source))  # type: ignore[operator]
        calls += 1
        real(self, name, tensor)

    monkeypatch.setattr(CheckpointWriter, "put", put)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        quantize(source, tmp_path / "out", Recipe.simple(4, "nf4"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_copied_model_outlives_its_file(source: Path) -> None:
    """In a process of its own, which SIGBUS would end."""
    code = f"""
import os, torch
from neoquant.loading.pretrained import load
model, _ = load({str(source)!r}, dtype="auto", mmap=False)
model.float()
again, _ = load({str(source)!r}, dtype="auto", mmap=False)
os.truncate({str(weights(source))!r}, 0)
assert torch.equal(model(torch.tensor([[1, 2]])).logits, again.float()(torch.tensor([[1, 2]])).logits)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def write(out: Path, version: int) -> None:
    """A folder whose tensors and config.json are of one version."""
    with CheckpointWriter(out, tensors=4, force=True) as sink:
        for number in range(4):
            sink.put(f"t{number}", torch.full((64, 65), version))
        sink.finish({"model_type": "gpt_neo", "version": version}, files={"note": str(version)})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_whoever_is_killed_leaves_a_whole_folder(tmp_path: Path) -> None:
    """Two hundred writers in a row, each replacing the folder over and over until it is killed."""
    out, chance = tmp_path / "out", random.Random(0)
    write(out, 0)
    for number in range(200):
        child = os.fork()
        if child == 0:
            for version in range(1000):
                write(out, 1000 * number + version)
            os._exit(0)
        time.sleep(chance.uniform(0.001, 0.015))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if not out.exists():  # without an exchange there is a moment between two renames: the next writer mends it
            assert not exchange_is_there(tmp_path)
            continue
        version = int((out / "note").read_text())
        assert f'"version": {version}' in (out / "config.json").read_text()
        tensors = load_file(weights(out))
        assert len(tensors) == 4 and all(bool((each == version).all()) for each in tensors.values())
    write(out, 7)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def exchange_is_there(folder: Path) -> bool:
    one, other = folder / "one", folder / "other"
    one.write_text("1")
    other.write_text("2")
    done = exchange(one, other)
    assert one.read_text() == ("2" if done else "1")
    one.unlink()
    other.unlink()
    return done


@pytest.mark.parametrize("can", [True, False])
def test_replacing_a_folder_leaves_nothing_else(can: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not can:
        monkeypatch.setattr(writer, "exchange", lambda one, other: False)
    for version in (1, 2):
        write(tmp_path / "out", version)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "note").read_text() == "2"


def test_a_mount_point_is_refused_before_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self == out)
    with pytest.raises(OutputError, match="out is a mount point, which no folder can take the place of"):
        quantize(source, out, Recipe.simple(4, "nf4"))


def test_a_result_has_one_writer(tmp_path: Path, cli: Cli) -> None:
    """While a process has it, no other gets it, from the command line neither; when that is killed, the next does."""
    path = tmp_path / "results" / "plan.json"
    path.parent.mkdir()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"claimed" if claim(path) else b"refused")
        time.sleep(60)
        os._exit(0)
    os.close(writing)
    try:
        assert os.read(reading, 7) == b"claimed"
        os.close(reading)
        refused = cli("plan", "neoquant-demo", "--json", path)
        assert refused.code == 1 and "plan.json is being written by another neoquant" in refused.error
        assert not path.exists()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    for _ in range(2):
        assert cli("plan", "neoquant-demo", "--json", path).code == 0
    assert [each.name for each in path.parent.iterdir()] == ["plan.json"]


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not end a process with another")
def test_who_is_killed_takes_along_what_it_started(tmp_path: Path) -> None:
    number = tmp_path / "number"
    inner = f"""
import os, time
from neoquant.cli.progress_lines import end_with_starter
end_with_starter()
open({str(number)!r}, "w").write(str(os.getpid()) + " ")
time.sleep(3600)
"""
    outer = f"""
import os, sys
from neoquant.cli.progress_lines import run_with_progress
from neoquant.progress import SILENT
run_with_progress([sys.executable, "-c", {inner!r}], os.environ, SILENT)
"""
    process = subprocess.Popen([sys.executable, "-c", outer])
    while not number.exists() or not number.read_text().endswith(" "):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    started, waited = int(number.read_text()), 0.0
    while is_running(started) and waited < 60:
        time.sleep(0.02)
        waited += 0.02
    if is_running(started):
        os.kill(started, signal.SIGKILL)
        pytest.fail("what it started lives on")


def is_running(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
