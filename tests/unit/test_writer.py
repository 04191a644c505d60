"""What CheckpointWriter leaves on the disk, and what it does not leave."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from neoquant.checkpoint import CheckpointWriter, TensorHeader, expected_size, free_bytes, open_checkpoint, shard
from neoquant.checkpoint.writer import check_output
from neoquant.errors import CheckpointError, OutputError

CONFIG = {"model_type": "gpt_neo", "hidden_size": 4}
TENSORS = {
    "a": torch.arange(15, dtype=torch.float32).reshape(3, 5),
    "b": torch.arange(7, dtype=torch.uint8),
    "c": torch.arange(16, dtype=torch.float16).reshape(4, 4),
    "d": torch.tensor(3, dtype=torch.uint8),
    "e": torch.arange(3, dtype=torch.bfloat16),
    "f": torch.tensor([True, False, True]),
    "g": torch.empty(0, 4),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int64, torch.bool)


def write(out: Path, tensors: dict[str, torch.Tensor], **options: Any) -> Path:
    files, announced = options.pop("files", {}), options.pop("announced", len(tensors))
    with CheckpointWriter(out, tensors=announced, **options) as sink:
        for name, tensor in tensors.items():
            sink.put(name, tensor)
        sink.finish(CONFIG, files=files)
    return out


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


def headers(tensors: dict[str, torch.Tensor]) -> list[TensorHeader]:
    return [TensorHeader(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@st.composite
def checkpoints(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    names = draw(st.lists(st.text(min_size=1, max_size=12), unique=True, max_size=8))
    names = [name for name in names if name != "__metadata__" and name.isprintable()]
    tensors = {}
    for name in names:
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        values = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(len(tensors)))
        tensors[name] = values.to(draw(st.sampled_from(DTYPES)))
    return tensors


@settings(max_examples=60, deadline=None)
@given(tensors=checkpoints(), shard_size=st.sampled_from([1, 16, 100, 5_000]), announced=st.integers(0, 8))
def test_any_tensors_come_back(tensors: dict[str, torch.Tensor], shard_size: int, announced: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = write(Path(folder) / "out", tensors, shard_size=shard_size, announced=announced)
        assert_same(load(out), tensors)
        with open_checkpoint(out) as checkpoint:
            assert_same({name: checkpoint.read(name) for name in checkpoint.headers}, tensors)
        again = write(Path(folder) / "again", tensors, shard_size=shard_size, announced=announced)
        assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}


@pytest.mark.parametrize("shard_size", [1, 40, 70, 5_000])
def test_expected_size_is_exact(tmp_path: Path, shard_size: int) -> None:
    out = write(tmp_path / "out", TENSORS, shard_size=shard_size)
    assert sum(file.stat().st_size for file in out.glob("model*")) == expected_size(headers(TENSORS), shard_size)


def test_every_tensor_is_aligned_to_its_type(tmp_path: Path) -> None:
    out = write(tmp_path / "out", TENSORS)
    data = (out / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % TENSORS[name].itemsize == 0, name


def test_a_longer_header_than_announced_moves_the_tensors(tmp_path: Path) -> None:
    tensors = {f"{'long' * 50}.{n}": torch.full((3,), n, dtype=torch.float16) for n in range(20)}
    out = write(tmp_path / "out", tensors, announced=1)
    assert_same(load(out), tensors)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]


def test_shards_and_index_look_like_transformers(tmp_path: Path) -> None:
    out = write(tmp_path / "out", TENSORS, shard_size=70)
    names = [file.name for file in weight_files(out)]
    assert names == [f"model-{n:05d}-of-{len(names):05d}.safetensors" for n in range(1, len(names) + 1)]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    for name, file in index["weight_map"].items():
        with safe_open(out / file, "pt") as shard:
            assert name in shard.keys()  # noqa: SIM118  (not a dictionary)
            assert shard.metadata() == {"format": "pt"}


@pytest.mark.parametrize("shard_size", [2_000, 5_000_000])
def test_transformers_loads_it(tmp_path: Path, shard_size: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTNeoConfig(
        vocab_size=11, hidden_size=8, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
    )
    model = transformers.GPTNeoForCausalLM(config)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    with CheckpointWriter(tmp_path / "out", tensors=len(state), shard_size=shard_size) as sink:
        for name, tensor in state.items():
            sink.put(name, tensor)
        sink.finish(config.to_dict(), files={})
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_same(loaded.state_dict(), model.state_dict())


def test_files_travel_along(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    files = {"README.md": "größer", "blob": b"\x00\xff", "vocab.json": tmp_path / "vocab.json"}
    out = write(tmp_path / "deep" / "out", TENSORS, files=files)
    assert (out / "README.md").read_text(encoding="utf-8") == "größer"
    assert (out / "blob").read_bytes() == b"\x00\xff"
    assert (out / "vocab.json").read_text() == "{}"
    assert json.loads((out / "config.json").read_text()) == CONFIG


@pytest.mark.parametrize("name", ["../escape", "a/b", "config.json", "model.safetensors"])
def test_illegal_or_taken_file_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises((ValueError, OutputError)):
        write(tmp_path / "out", TENSORS, files={name: ""})
    assert list(tmp_path.iterdir()) == []


def test_put_refuses_what_it_cannot_store(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="'a' was written already"),
        CheckpointWriter(tmp_path / "x", tensors=2) as sink,
    ):
        sink.put("a", torch.ones(1))
        sink.put("a", torch.ones(1))
    with pytest.raises(CheckpointError, match="complex128"), CheckpointWriter(tmp_path / "x", tensors=1) as sink:
        sink.put("a", torch.ones(1, dtype=torch.complex128))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_leaving_early_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), CheckpointWriter(tmp_path / "out", tensors=9) as sink:
        sink.put("a", TENSORS["a"])
        sink.put("b", TENSORS["b"])
        raise error
    assert list(tmp_path.iterdir()) == []


def test_forgetting_to_finish_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="finish"), CheckpointWriter(tmp_path / "out", tensors=1) as sink:
        sink.put("a", TENSORS["a"])
    assert list(tmp_path.iterdir()) == []


def refuse(number: int) -> Callable[..., Any]:
    def call(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


def test_a_full_disk_names_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        write = staticmethod(refuse(errno.ENOSPC))

    monkeypatch.setattr(shard.Shard, "_lane_file", lambda *_: Full)
    with pytest.raises(
        OutputError, match=r"disk is full: cannot write tensor 'a' \(60 bytes needed, [\d.,]+ \w+ free\)"
    ):
        write(tmp_path / "out", TENSORS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("call", ["fsync", "Path.write_bytes", "shutil.copyfileobj"])
def test_the_disk_fails_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    owner = {"fsync": os, "Path.write_bytes": Path, "shutil.copyfileobj": shard.shutil}[call]
    with monkeypatch.context() as patch:
        patch.setattr(owner, call.split(".")[-1], refuse(number))
        with pytest.raises(OutputError, match=r"disk is full|cannot write"):
            write(tmp_path / "out", TENSORS)
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_left_alone(tmp_path: Path) -> None:
    out = write(tmp_path / "out", {"old": torch.zeros(1)})
    with pytest.raises(OutputError, match="exists; choose another name, or replace it with --force"):
        write(out, TENSORS)
    assert_same(load(out), {"old": torch.zeros(1)})


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert_same(load(write(tmp_path / "out", TENSORS)), TENSORS)


def test_an_interruption_while_entering_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr("neoquant.checkpoint.writer.take_lock", interrupt)
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path / "out", tensors=1):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("force", [False, True])
def test_the_current_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="is the current folder, expected the name of a new one"):
        check_output(Path(), force)
    assert Path.cwd() == tmp_path


def test_force_replaces_a_model_whole(tmp_path: Path) -> None:
    out = write(tmp_path / "out", {"old": torch.zeros(1)}, files={"stale.txt": ""})
    write(out, TENSORS, force=True)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(load(out), TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_keeps_the_old_model_until_the_new_one_is_whole(tmp_path: Path) -> None:
    out = write(tmp_path / "out", {"old": torch.zeros(1)})
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(out, tensors=1, force=True) as sink:
        sink.put("new", torch.ones(1))
        raise KeyboardInterrupt
    assert_same(load(out), {"old": torch.zeros(1)})


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()])
def test_a_failing_rename_restores_the_old_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    out = write(tmp_path / "out", {"old": torch.zeros(1)})
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.setattr("neoquant.checkpoint.writer.exchange", lambda one, other: False)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        write(out, TENSORS, force=True)
    assert_same(load(out), {"old": torch.zeros(1)})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("config", [None, "{}", "[]", "not json", '{"name": "another program\'s"}'])
def test_force_does_not_delete_what_is_no_model(tmp_path: Path, config: str | None) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    if config is not None:
        (out / "config.json").write_text(config)
    with pytest.raises(OutputError, match="is not a model folder"):
        write(out, TENSORS, force=True)
    assert (out / "thesis.tex").exists()


def test_force_does_not_delete_folders_within(tmp_path: Path) -> None:
    out = write(tmp_path / "out", TENSORS)
    (out / "experiments").mkdir()
    with pytest.raises(OutputError, match="holds a folder \\(experiments\\)"):
        write(out, TENSORS, force=True)
    assert (out / "experiments").exists()


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_in_the_way(tmp_path: Path, force: bool) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        write(tmp_path / "file", TENSORS, force=force)
    with pytest.raises(OutputError, match="cannot create the folder"):
        write(tmp_path / "file" / "below", TENSORS, force=force)
    with pytest.raises(OutputError, match=r"/ exists|/ is not a model folder"):
        write(Path("/"), TENSORS, force=force)


def test_output_that_appears_meanwhile_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="exists"), CheckpointWriter(out, tensors=1) as sink:
        sink.put("a", torch.ones(1))
        out.mkdir()
        (out / "other").write_text("")
        sink.finish(CONFIG, files={})
    assert [path.name for path in out.iterdir()] == ["other"]


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    target = write(tmp_path / "target", {"old": torch.zeros(1)})
    (tmp_path / "link").symlink_to(target)
    write(tmp_path / "link", TENSORS, force=True)
    assert (tmp_path / "link").is_symlink()
    assert_same(load(target), TENSORS)


def test_leftovers_of_the_dead_are_swept(tmp_path: Path) -> None:
    dead = tmp_path / ".[out].partial-4"
    dead.mkdir()
    (dead / "shard-1").write_text("half a shard")
    (tmp_path / ".other.partial-4").mkdir()
    write(tmp_path / "[out]", TENSORS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.partial-4", "[out]"]


def test_a_model_lost_between_two_renames_returns(tmp_path: Path) -> None:
    write(tmp_path / "out", TENSORS).rename(tmp_path / ".out.replaced-4")
    with pytest.raises(OutputError, match="exists"):
        write(tmp_path / "out", {})
    assert_same(load(tmp_path / "out"), TENSORS)


def test_the_living_are_not_swept(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", tensors=1) as sink:
        sink.put("a", torch.ones(1))
        with pytest.raises(OutputError, match="is being written already"):
            write(tmp_path / "out", TENSORS)
        sink.finish(CONFIG, files={})
    assert_same(load(tmp_path / "out"), {"a": torch.ones(1)})


def test_memory_holds_a_tensor_not_the_checkpoint(tmp_path: Path) -> None:
    """Odd sizes are the hard case: they cannot be written where they will stand."""
    script = """
import resource, sys, torch
from neoquant.checkpoint import CheckpointWriter, open_checkpoint
tensor = torch.zeros(4_000_001, dtype=torch.uint8)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
with CheckpointWriter(sys.argv[1], tensors=40) as sink:
    for n in range(40):
        sink.put(str(n), tensor)
    sink.finish({"model_type": "gpt_neo"}, files={})
with open_checkpoint(sys.argv[1]) as checkpoint:
    for name in checkpoint.headers:
        checkpoint.read(name)
print(peak() - before)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert int(done.stdout) < 64, "MiB more than before, for 160 MB written and read"


def test_free_bytes_of_a_folder_yet_to_be_made(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "yet") > 0
