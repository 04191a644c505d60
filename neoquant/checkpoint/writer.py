"""Write a checkpoint one tensor at a time, so that it appears whole or not at all.

Everything is written into a hidden folder beside the target, which gets its name by one rename at the end.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from neoquant.checkpoint.folder import reading
from neoquant.checkpoint.headers import TensorHeader, require_storable
from neoquant.checkpoint.shard import Layout, Shard, header_reserve
from neoquant.checkpoint.weight_files import CONFIG
from neoquant.errors import CheckpointError, OutputError
from neoquant.files.exchanging import exchange
from neoquant.files.locks import close_folder, open_folder, take_lock
from neoquant.files.names import resolved
from neoquant.files.reading import read_json
from neoquant.files.writing import as_bytes, sync_folder
from neoquant.sizes import size

SHARD_SIZE = 5_000_000_000


class CheckpointWriter:
    """Write a checkpoint folder::

        with CheckpointWriter(out, tensors=len(headers)) as sink:
            for name, tensor in ...:
                sink.put(name, tensor)
            sink.finish(config, files={"README.md": card, "tokenizer.json": path})

    Leaving the block before `finish`, by an error or Ctrl-C, leaves nothing behind.

    Args:
        out: the folder to make. It must not exist, unless empty or with `force`.
        tensors: how many are to come, to reserve space for the header; a wrong guess costs time, not correctness.
        force: replace an existing model folder. The old one stays until the new one is complete.
        shard_size: bytes of tensors in a file, at most, unless one tensor alone is larger.
        keeps: names of files that `out` may hold without `force`: they will be among what `finish` writes, or may go.

    Raises:
        OutputError: on entering, where `out` may not be written; later, where the disk is full or refuses.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        tensors: int,
        force: bool = False,
        shard_size: int = SHARD_SIZE,
        keeps: Collection[str] = (),
    ) -> None:
        self.out = resolved(out)
        self.shard_size = shard_size
        self._force, self._keeps = force, keeps
        self._reserve = header_reserve(tensors)
        self._partial = self.out.parent / f".{self.out.name}.partial-{os.getpid()}"
        self._replaced = self.out.parent / f".{self.out.name}.replaced-{os.getpid()}"
        self._lock: int | None = None
        self._shards: list[Shard] = []
        self._names: set[str] = set()
        self._finished = False

    def __enter__(self) -> CheckpointWriter:
        with _explained("create the folder", self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            _sweep(self.out)
            check_output(self.out, self._force, self._keeps)
            try:
                self._partial.mkdir()
            except FileExistsError:
                raise OutputError(f"{self.out} is being written already (to {self._partial})") from None
            try:
                self._lock = open_folder(self._partial)
                take_lock(self._lock)
            except BaseException:  # __exit__ is not called for what happens here, Ctrl-C included
                self._partial.rmdir()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for shard in self._shards:
            shard.abandon()
        close_folder(self._lock)
        _remove(self._partial)
        if error is None and not self._finished:
            raise RuntimeError("finish() was not called, so no checkpoint was written")

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor now and forget it.

        Raises:
            OutputError: the disk is full, or cannot be written to.
            CheckpointError: safetensors files have no such type.
            ValueError: the name was used before.
        """
        header = TensorHeader(name, tensor.dtype, tuple(tensor.shape))
        if name in self._names:
            raise ValueError(f"tensor {name!r} was written already")
        require_storable(header)
        self._names.add(name)
        with _explained(f"write tensor {name!r}", self.out, header.nbytes):
            if not self._shards or not self._shards[-1].takes(header, self.shard_size):
                self._next_shard()
            self._shards[-1].add(header, tensor)

    def finish(self, config: Mapping[str, Any], *, files: Mapping[str, bytes | str | Path]) -> None:
        """Write config.json, the index and `files` (name -> content, or a file to copy), then give the folder its name.

        Of `config`, what tells where the model lay on this machine is left out; nothing reads it.

        Raises:
            OutputError: the disk is full or refuses, or `out` has appeared in the meantime.
        """
        with _explained("write the weights", self.out):
            if not self._shards:
                self._next_shard()
            self._shards[-1].close()
            index = self._name_shards()
        config = {key: value for key, value in config.items() if key != "_name_or_path"}
        for name, content in [(CONFIG, _json(config)), *index.items(), *files.items()]:
            if name != Path(name).name:
                raise ValueError(f"{name!r} is not a plain file name")
            with _explained(f"write {name}", self.out):
                _write_file(self._partial / name, content)
        with _explained("rename the finished folder", self.out):
            sync_folder(self._partial)
            self._put_in_place()
        self._finished = True

    def _next_shard(self) -> None:
        if self._shards:
            self._shards[-1].close()
        self._shards.append(Shard(self._partial / f"shard-{len(self._shards) + 1}", self._reserve))

    def _name_shards(self) -> dict[str, str]:
        """Give the shards their final names; return the index file, if there must be one."""
        for shard, name in zip(self._shards, _shard_names(len(self._shards)), strict=True):
            shard.path.rename(self._partial / name)
        return _index([shard.layout for shard in self._shards])

    def _put_in_place(self) -> None:
        if not self.out.exists() or not any(self.out.iterdir()):
            self._partial.rename(self.out)
        else:
            check_output(self.out, self._force, self._keeps)  # it may have appeared since we began
            if exchange(self._partial, self.out):  # there is a whole folder of that name at every moment
                sync_folder(self.out.parent)  # before what was there goes, which it does with the rest of our own
                return
            try:
                self.out.rename(self._replaced)
                self._partial.rename(self.out)
            except BaseException:
                if not self.out.exists():
                    self._replaced.rename(self.out)
                raise
            sync_folder(self.out.parent)
            _remove(self._replaced)
        sync_folder(self.out.parent)


def check_output(out: Path, force: bool, keeps: Collection[str] = ()) -> None:
    """Raise OutputError unless `out` is free, empty, or, with `force`, a model folder that may be replaced.

    It may also hold files named in `keeps`, which are to be kept or may be replaced.

    Replacing is deleting, so whatever is not plainly a model folder is left alone.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise OutputError(f"{out} is a file, expected the name of a new folder")
    entries = list(out.iterdir())
    if out.resolve() == Path.cwd():  # to replace it would leave the user's shell in a folder that is gone
        raise OutputError(f"{out.resolve()} is the current folder, expected the name of a new one")
    if all(entry.name in keeps and entry.is_file() and not entry.is_symlink() for entry in entries):
        _require_no_mount(out)
        return
    if not force:
        raise OutputError(f"{out} exists; choose another name, or replace it with --force (in Python force=True)")
    if not _is_model_config(out / CONFIG):
        raise OutputError(
            f"{out} is not a model folder (it holds no config.json of one), so --force (in Python force=True) does not "
            "replace it"
        )
    for entry in entries:
        if entry.is_dir():
            raise OutputError(
                f"{out} holds a folder ({entry.name}), which is more than a model, so --force (in Python "
                "force=True) does not replace it"
            )
    _require_no_mount(out)


def _require_no_mount(out: Path) -> None:
    """Raise OutputError where nothing could be renamed to `out`, which would be found out when all is done."""
    if out.resolve().is_mount():
        raise OutputError(f"{out} is a mount point, which no folder can take the place of: name a folder in it")


def expected_size(headers: Iterable[TensorHeader], shard_size: int = SHARD_SIZE) -> int:
    """Bytes of the weight files, and of their index, that CheckpointWriter makes of these tensors.

    They are put in this order, and all were announced.
    """
    headers = list(headers)
    reserve = header_reserve(len(headers))
    shards = [Layout()]
    for header in headers:
        if not shards[-1].takes(header, shard_size):
            shards.append(Layout())
        shards[-1].add(header)
    index = sum(len(as_bytes(text)) for text in _index(shards).values())
    return index + sum(len(shard.head(reserve)) + shard.nbytes for shard in shards)


def free_bytes(path: str | Path) -> int:
    """Bytes free to this user on the disk where `path` is, or would be."""
    path = Path(path).resolve()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _index(shards: list[Layout]) -> dict[str, str]:
    """The file that says which shard holds which tensor, by its name; one shard needs none."""
    if len(shards) == 1:
        return {}
    shard_of = {
        header.name: name
        for name, shard in zip(_shard_names(len(shards)), shards, strict=True)
        for header in shard.tensors()
    }
    total = sum(shard.nbytes for shard in shards)
    return {"model.safetensors.index.json": _json({"metadata": {"total_size": total}, "weight_map": shard_of})}


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _write_file(path: Path, content: bytes | str | Path) -> None:
    if path.exists():
        raise ValueError(f"{path.name!r} is written twice")
    if isinstance(content, Path):
        with reading(content):
            content.open("rb").close()
        shutil.copyfile(content, path)
    else:
        path.write_bytes(as_bytes(content))
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _is_model_config(path: Path) -> bool:
    try:
        return "model_type" in read_json(path)
    except (CheckpointError, TypeError):
        return False


def _sweep(out: Path) -> None:
    """Clear up behind writers of `out` that were killed."""

    def leftovers(kind: str) -> list[Path]:
        ours = re.compile(rf"\.{re.escape(out.name)}\.{kind}-\d+")
        return [path for path in out.parent.iterdir() if ours.fullmatch(path.name) and not path.is_symlink()]

    for replaced in leftovers("replaced"):
        if out.exists():
            _remove(replaced)
        else:  # killed between the two renames: the old checkpoint is the only whole one
            replaced.rename(out)
    for partial in leftovers("partial"):
        descriptor = open_folder(partial)
        try:
            if take_lock(descriptor):  # without locks it might be a living writer's
                _remove(partial)
        finally:
            close_folder(descriptor)


def _remove(folder: Path) -> None:
    """Delete a folder of ours as far as that goes; a model that was replaced may have been made read-only."""
    with suppress(OSError):
        folder.chmod(stat.S_IRWXU)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _explained(deed: str, out: Path, nbytes: int | None = None) -> Iterator[None]:
    """Turn an OSError into an OutputError that says what could not be done, and what would help."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            needed = "" if nbytes is None else f"{size(nbytes)} needed, "
            raise OutputError(
                f"{out}: the disk is full: cannot {deed} ({needed}{size(free_bytes(out))} free); "
                "nothing was left behind"
            ) from error
        raise OutputError(f"{out}: cannot {deed} ({error.strerror or error})") from error
