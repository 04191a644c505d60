"""Damaged, lying and malicious model folders: each gives one line that names the file and what is wrong."""

from __future__ import annotations

import json
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from neoquant.checkpoint import open_checkpoint
from neoquant.errors import CheckpointError, ConfigError

Damage = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neo"}')
    return tmp_path


def assert_refused(folder: Path, *fragments: str, kind: type[CheckpointError] = CheckpointError) -> None:
    with pytest.raises(kind) as caught, open_checkpoint(folder) as checkpoint:
        for name in checkpoint.headers:
            checkpoint.read(name)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    for fragment in fragments:
        assert fragment in message, message


def safetensors(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


GOOD = save({"a": torch.ones(4), "b": torch.ones(2, 3)})


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "truncated, or not a safetensors file"),
        (b"1234", "truncated, or not a safetensors file"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 250\n",
            "is a Git LFS pointer",
        ),
        (b"\xff" * 100, "truncated, or not a safetensors file"),
        (GOOD[:-1], "truncated"),
        (GOOD[:40], "truncated"),
        (GOOD + b"\0", "bytes left over"),
        (safetensors(b"{}}"), "not JSON"),
        (safetensors(b"\xff\xfe"), "not JSON"),
        (safetensors(b"[" * 100_000), "not JSON"),
        (safetensors(b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": 1}', b"1"), "twice"),
        (safetensors([]), "not a JSON object"),
        (safetensors({"a": 1}), "tensor 'a' is described by 1"),
        (safetensors({"a": {"dtype": "U8"}}), "expected dtype, shape and data_offsets"),
        (safetensors({"a": entry(0, 4, [-2, -2])}, b"1234"), "tensor 'a' is described by"),
        (safetensors({"a": entry(0, 4, [True, 4])}, b"1234"), "tensor 'a' is described by"),
        (safetensors({"a": entry(0, 4, [4.0])}, b"1234"), "tensor 'a' is described by"),
        (safetensors({"a": entry(0, 4, "4")}, b"1234"), "tensor 'a' is described by"),
        (safetensors({"a": entry(0, 4, 4)}, b"1234"), "tensor 'a' is described by"),
        (safetensors({"a": entry(0, 4, dtype=["U8"])}, b"1234"), "tensor 'a' is described by"),
        (safetensors({"a": entry(0, 4, [2], "F4")}, b"1234"), "has the dtype 'F4'; known are F64"),
        (safetensors({"a": entry(0, 4, [2], "F32")}, b"1234"), "spans 4 bytes, but F32 of shape [2] takes 8"),
        (safetensors({"a": entry(0, 4, [2**62, 2**62])}, b"1234"), "spans 4 bytes"),
        (safetensors({"a": entry(0, 0, [0, 10**30])}), "tensor 'a' is described by"),
        (safetensors({"a": entry(4, 0, [4])}, b"1234"), "spans -4 bytes"),
        (safetensors({"a": entry(0, 4), "b": entry(2, 6)}, b"123456"), "overlaps"),
        (safetensors({"a": entry(0, 4), "b": entry(5, 6)}, b"123456"), "leaves a hole"),
        (safetensors({"a": entry(2, 6)}, b"123456"), "leaves a hole"),
        (safetensors({"a": entry(0, 9)}, b"123456"), "truncated"),
    ],
)
def test_damaged_safetensors(folder: Path, content: bytes, fragment: str) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert_refused(folder, "model.safetensors", fragment)


def test_a_header_too_long_is_not_read(folder: Path) -> None:
    with (folder / "model.safetensors").open("wb") as file:  # sparse: takes no space
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)
    assert_refused(folder, "model.safetensors", "claims 200000000 bytes, at most 100000000")


def test_a_file_that_shrinks_while_it_is_read(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(GOOD)
    with open_checkpoint(folder) as checkpoint:
        (folder / "model.safetensors").write_bytes(GOOD[:-4])
        with pytest.raises(CheckpointError, match=r"model.safetensors: ends 4 bytes before the end of tensor 'b'"):
            checkpoint.read("b")


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, len(GOOD) - 1), value=st.integers(0, 255))
def test_any_changed_byte_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    folder = tmp_path_factory.mktemp("changed")
    (folder / "config.json").write_text('{"model_type": "gpt_neo"}')
    (folder / "model.safetensors").write_bytes(GOOD[:position] + bytes([value]) + GOOD[position + 1 :])
    try:
        with open_checkpoint(folder) as checkpoint:
            for name in checkpoint.headers:
                checkpoint.read(name)
    except CheckpointError as error:
        assert "\n" not in str(error)


class Harmful:
    """Unpickling it would run a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("a pickle has run code",))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_never_runs(folder: Path, capsys: pytest.CaptureFixture[str], zipped: bool) -> None:
    torch.save({"a": Harmful()}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_refused(folder, "pytorch_model.bin", "holds more than tensors", "convert the model to safetensors")
    assert capsys.readouterr().out == ""


def plain_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Harmful()))


def truncated(path: Path) -> None:
    torch.save({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-500])


def lacking_a_storage(path: Path) -> None:
    torch.save({"a": torch.ones(10), "b": torch.ones(20)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            if not name.endswith("data/1"):
                archive.writestr(name, content)


def shorter_storage(path: Path) -> None:
    torch.save({"a": torch.ones(10)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content[:4] if name.endswith("data/0") else content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04 is how a zip begins"),
        lambda path: path.write_bytes(random.Random(0).randbytes(5000)),
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\nsize 12\n"),
        lambda path: torch.save([torch.ones(3)], path),
        lambda path: torch.save(torch.ones(3), path),
        lambda path: torch.save({"a": torch.ones(3), "step": 7}, path),
        lambda path: torch.save({1: torch.ones(3)}, path),
        lambda path: torch.save({"model": {"a": torch.ones(3)}, "module": {"a": torch.ones(3)}}, path),
        lambda path: torch.save({"a": torch.ones(3).to_sparse()}, path),
        plain_pickle,
        truncated,
        lacking_a_storage,
        shorter_storage,
    ],
)
def test_damaged_torch_files(folder: Path, damage: Damage, capsys: pytest.CaptureFixture[str]) -> None:
    damage(folder / "pytorch_model.bin")
    assert_refused(folder, "pytorch_model.bin")
    assert capsys.readouterr().out == ""


@pytest.fixture
def sharded(folder: Path) -> Path:
    save_file({"a": torch.ones(3)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(3)}, folder / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    write_index(folder, {"weight_map": weight_map})
    open_checkpoint(folder).close()
    return folder


def write_index(folder: Path, index: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(index if isinstance(index, str) else json.dumps(index))


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert_refused(sharded, "index.json", "model-00002-of-00002.safetensors, which is missing")


def test_a_truncated_shard(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-2])
    assert_refused(sharded, "model-00002-of-00002.safetensors", "truncated")


def test_a_shard_without_a_promised_tensor(sharded: Path) -> None:
    save_file({}, sharded / "model-00002-of-00002.safetensors")
    assert_refused(sharded, "model-00002-of-00002.safetensors", "lacks tensor 'b'")


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.ones(3)}, sharded / "model-00002-of-00002.safetensors")
    assert_refused(sharded, "model-00002-of-00002.safetensors", "'a' is also in model-00001-of-00002.safetensors")


def test_a_tensor_in_no_index(sharded: Path) -> None:
    save_file({"b": torch.ones(3), "c": torch.ones(3)}, sharded / "model-00002-of-00002.safetensors")
    assert_refused(sharded, "model-00002-of-00002.safetensors", "'c'", "puts in no shard")


@pytest.mark.parametrize(
    "index",
    ["", "[]", "{}", {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": None}, "[" * 9**5]
    + [{"weight_map": {"a": file}} for file in ("../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "")],
)
def test_a_damaged_index(sharded: Path, index: Any) -> None:
    write_index(sharded, index)
    assert_refused(sharded, "model.safetensors.index.json")


@pytest.mark.parametrize(
    ("config", "fragment"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "model_type is None, expected 'gpt_neo'"),
        ('{"model_type": "llama"}', "model_type is 'llama', expected 'gpt_neo'"),
        ('{"model_type": ["gpt_neo"]}', "expected 'gpt_neo'"),
    ],
)
def test_a_config_that_is_no_gpt_neo(folder: Path, config: str, fragment: str) -> None:
    (folder / "model.safetensors").write_bytes(GOOD)
    (folder / "config.json").write_text(config)
    assert_refused(folder, "config.json", fragment, kind=ConfigError)


def test_a_config_that_is_not_text(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(GOOD)
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    assert_refused(folder, "config.json", "cannot be read")


def test_folders_that_are_no_models(tmp_path: Path, folder: Path) -> None:
    assert_refused(folder, "holds no weights that can be read, expected one of model.safetensors")
    (folder / "config.json").unlink()
    assert_refused(folder, "holds no config.json")
    (folder / "file").write_text("")
    assert_refused(folder / "file", "is a file, expected a model folder")
    assert_refused(folder / "missing", "there is no folder")
    (folder / "loop").symlink_to(folder / "loop")
    assert_refused(folder / "loop")


@pytest.mark.parametrize(
    "source", ["", "a/b/c", "../x", "a//b", "-x", "https://example.org/x", "a b", "a\nb", "a\0b", "x" * 300]
)
def test_names_that_are_neither_folder_nor_model(source: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source)
    assert "\n" not in str(caught.value)
