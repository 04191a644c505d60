"""Open a model folder or hub id: its configuration, its tensors' names and shapes, and each tensor when asked for.

Opening reads headers only. `read` copies a tensor into memory of its own; `view` maps it where it lies in the file,
which copies nothing, and `forget` gives such memory back as soon as the tensor has been dealt with: pages of a memory
map count against the process until then, or until the system wants them back.

Who cuts a mapped file short takes memory from under the process, which the system answers with SIGBUS. So pages are
asked for when a tensor is viewed, which fails in order, and `require_unchanged` says whether a file was rewritten.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO

import torch

from neoquant import demo
from neoquant.checkpoint import hub
from neoquant.checkpoint.folder import companion_files, files_of, find_folder, list_tensors, read_config, reading
from neoquant.checkpoint.headers import TensorHeader
from neoquant.checkpoint.normalize import head_and_embedding, normalize, ties_head
from neoquant.checkpoint.stored import Span, Stored
from neoquant.checkpoint.weight_files import is_companion
from neoquant.errors import CheckpointError, locate
from neoquant.model.names import EMBEDDING, TIED_HEAD
from neoquant.progress import SILENT, Progress
from neoquant.sizes import plural

__all__ = ["Checkpoint", "Stored", "companion_files", "find_companions", "open_checkpoint"]


_SMALL = 1 << 16
"""Bytes up to which a tensor is copied rather than viewed."""
_POPULATE_READ = 22 if sys.platform == "linux" else None  # MADV_POPULATE_READ, from Linux 5.14 on; see madvise(2)


class Checkpoint:
    """An opened checkpoint. Use it in a `with` block: files stay open from their first read until `close`.

    Attributes:
        source: what was asked for, a folder or a hub id.
        revision: the commit on the hub; None for a folder.
        folder: where the files are; None when only the headers were fetched from the hub.
        config: config.json as read; what the files contradict is put right, and `notes` say so.
        headers: GPT-Neo's name -> TensorHeader, in file order.
        dropped: names left out of `headers`: mask buffers of old checkpoints, and the second name of a tied head.
        notes: what is unusual about the files and was dealt with, a line each.
        nbytes: size of all tensors in `headers`.
    """

    def __init__(
        self,
        source: str,
        revision: str | None,
        folder: Path | None,
        config: dict[str, Any],
        stored: Iterable[Stored],
        remote_sizes: Mapping[str, int] | None = None,
        notes: Iterable[str] = (),
        mapped: bool = True,
    ) -> None:
        with locate(source):
            kept, dropped, renamed = normalize(stored, config)
        self.source = source
        self.revision = revision
        self.folder = folder
        self.config = config
        self.headers: Mapping[str, TensorHeader] = MappingProxyType(
            {name: entry.header for name, entry in kept.items()}
        )
        self.dropped = dropped
        self.nbytes = sum(header.nbytes for header in self.headers.values())
        self.notes = (*notes, *renamed)
        self._stored = kept
        self._remote_sizes = remote_sizes or {}
        self._open_files: dict[Path, BinaryIO] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._mapped = mapped
        self._stamps = {} if folder is None else {path: _stamp(path) for path in self.weight_files()}
        self._untie_another_head()

    @property
    def source_name(self) -> str:
        """The hub id, or the folder's name without where it lies on this machine."""
        return self.source if self.revision is not None else Path(self.source).resolve().name

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._maps.clear()  # each is unmapped with the last tensor that lies in it
        while self._open_files:
            self._open_files.popitem()[1].close()

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, on the CPU, contiguous, in its stored type.

        Raises:
            CheckpointError: no such tensor, only the headers are here, or the file cannot be read.
        """
        header, path, place = self._find(name)
        if isinstance(place, torch.Tensor):
            return place.contiguous()
        with reading(path):
            return _read_strided(self._open(path), header, place)

    def view(self, name: str) -> torch.Tensor:
        """One tensor as `read` gives it, but in the file's own memory where that can be: nothing is read before it is
        used, and nothing is copied but what is small. It outlives the checkpoint, and its file must not be cut short
        as long as it lives.

        Raises:
            CheckpointError: no such tensor, only the headers are here, or the file cannot be read.
        """
        header, path, place = self._find(name)
        if isinstance(place, torch.Tensor) or place.stride or place.begin % header.dtype.itemsize or not header.numel:
            return self.read(name)
        if not self._mapped or header.nbytes <= _SMALL:
            return self.read(name)
        with reading(path):
            if path not in self._maps:
                # Copy on write: torch wants memory that could be written, and the file is never changed by it.
                self._maps[path] = mmap.mmap(self._open(path).fileno(), 0, access=mmap.ACCESS_COPY)
            mapped = self._maps[path]
            there = min(len(mapped), os.fstat(self._open(path).fileno()).st_size)
            if place.begin + header.nbytes > there:
                missing = place.begin + header.nbytes - there
                raise CheckpointError(f"ends {plural(missing, 'byte')} before the end of tensor {header.name!r}")
            _populate(mapped, place.begin, header)
            tensor = torch.frombuffer(mapped, dtype=header.dtype, count=header.numel, offset=place.begin)
        return tensor.reshape(header.shape)

    def forget(self, name: str) -> None:
        """Give back the memory of a tensor that was viewed. It may still be used, and is then read once more."""
        header, path, place = self._find(name)
        if path in self._maps and isinstance(place, Span) and hasattr(mmap, "MADV_DONTNEED"):
            begin, length = _pages(place.begin, place.begin + header.nbytes)
            self._maps[path].madvise(mmap.MADV_DONTNEED, begin, length)

    def _find(self, name: str) -> Stored:
        if name not in self._stored:
            raise CheckpointError(f"{self.source} has no tensor {name!r}")
        self._need_folder()
        return self._stored[name]

    def _open(self, path: Path) -> BinaryIO:
        if path not in self._open_files:
            self._open_files[path] = path.open("rb", buffering=0)
        return self._open_files[path]

    def require_unchanged(self) -> None:
        """Raise CheckpointError where a file of weights has been rewritten since the checkpoint was opened: what was
        read may be of two versions."""
        for path, stamp in self._stamps.items():
            with reading(path):
                if _stamp(path) != stamp:
                    raise CheckpointError("was changed by another program while it was read: nothing is made of it")

    def weight_files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted({entry.file for entry in self._stored.values()})

    def companions(self) -> list[Path]:
        """The files that travel with the weights: tokenizer, generation defaults, license."""
        return companion_files(self._need_folder())

    def companion_sizes(self) -> dict[str, int]:
        """Name -> bytes of the files that travel with the weights, also where only headers were fetched."""
        if self.folder is not None:
            return {path.name: path.stat().st_size for path in self.companions()}
        found = self._remote_sizes.items()
        return {name: size for name, size in found if is_companion(name)}

    def _untie_another_head(self) -> None:
        """Take the head for tied only if the file has no other one.

        As transformers does: a config.json that ties head and embedding, or says nothing, is wrong where the file
        holds both and they differ.
        """
        head, embedding = head_and_embedding(self.headers)
        if not (ties_head(self.config) and head and embedding):
            return
        if self.folder is None:
            self.notes += (
                f"{TIED_HEAD} is taken for {EMBEDDING}, as config.json says; quantizing keeps it if the values differ",
            )
        elif head.keys() != embedding.keys() or not all(self._same(head[key], embedding[key]) for key in head):
            self.config = {**self.config, "tie_word_embeddings": False}
            self.notes += (
                f"{TIED_HEAD} differs from {EMBEDDING}, though config.json ties the two: both are kept, and "
                "tie_word_embeddings is taken for false",
            )

    def _same(self, name: str, other: str) -> bool:
        """Whether two tensors have the same values, bit for bit where their types are the same."""
        if self.headers[name].shape != self.headers[other].shape:
            return False
        first, second = self.view(name), self.view(other)
        if first.dtype == second.dtype:
            first, second = first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8)
        else:
            exact = torch.promote_types(first.dtype, second.dtype)
            first, second = first.to(exact), second.to(exact)
        same = torch.equal(first, second)
        self.forget(name)
        self.forget(other)
        return same

    def _need_folder(self) -> Path:
        if self.folder is None:
            raise CheckpointError(f"only the headers of {self.source} were fetched, not its files")
        return self.folder


def open_checkpoint(
    source: str | Path | None,
    *,
    revision: str | None = None,
    headers_only: bool = False,
    mmap: bool = True,
    progress: Progress = SILENT,
) -> Checkpoint:
    """Open a GPT-Neo in a folder or on the hub.

    Args:
        source: a folder; or, where no such folder exists, a hub id (`name` or `user/name`); None or "neoquant-demo" is
            the bundled model.
        revision: branch, tag or commit on the hub.
        headers_only: fetch some kilobytes of headers from the hub instead of the files.
        mmap: `view` maps large tensors where they lie in their files; False copies all of them.
        progress: told of downloads.

    Raises:
        CheckpointError: missing, damaged, or not a GPT-Neo (ConfigError).
        HubError: the hub does not have it or cannot be reached.
        RequestError: a revision of a folder.
    """
    source = demo.resolve(source)
    folder = find_folder(source, revision)
    if folder is not None:
        return _open_folder(str(source), folder, None, mmap)
    model = hub.find(str(source), revision)
    config, notes = read_config(model.folder)  # before gigabytes are fetched of something else than a GPT-Neo
    tensors = hub.fetch_headers(model) if headers_only else None
    if tensors is not None:
        stored = [Stored(header, Path(file), Span(begin, ())) for header, file, begin in tensors]
        return Checkpoint(str(source), model.commit, None, config, stored, model.sizes, notes)
    hub.fetch_files(model, progress)
    return _open_folder(str(source), model.folder, model.commit, mmap)


def find_companions(source: str | Path | None, *, revision: str | None = None) -> Path:
    """A folder with what travels with a model's weights: a folder itself, or what is fetched from the hub without them.

    Raises what `open_checkpoint` does, but for what is wrong inside the folder.
    """
    source = demo.resolve(source)
    folder = find_folder(source, revision)
    if folder is not None:
        return folder
    model = hub.find(str(source), revision)
    hub.fetch_files(model, SILENT, weights=False)
    return model.folder


def _open_folder(source: str, folder: Path, revision: str | None, mapped: bool) -> Checkpoint:
    config, notes = read_config(folder)
    weights = files_of(folder)
    tensors = list_tensors(folder, weights, ties_head(config))
    return Checkpoint(source, revision, folder, config, tensors.stored, None, (*notes, *tensors.notes), mapped)


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file is rewritten or replaced."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _populate(mapped: mmap.mmap, begin: int, header: TensorHeader) -> None:
    """Have the system map the pages of a tensor, or at least read them.

    Raises:
        CheckpointError: the file has been cut short.
    """
    pages = _pages(begin, begin + header.nbytes)
    try:
        if _POPULATE_READ is not None:
            mapped.madvise(_POPULATE_READ, *pages)
            return
    except OSError as error:
        if error.errno == errno.EFAULT:
            raise CheckpointError(f"was cut short while tensor {header.name!r} was read") from None
        if error.errno != errno.EINVAL:  # an older system does not know it
            raise
    if hasattr(mmap, "MADV_WILLNEED"):
        mapped.madvise(mmap.MADV_WILLNEED, *pages)


def _read_strided(file: BinaryIO, header: TensorHeader, span: Span) -> torch.Tensor:
    """Read the bytes from a tensor's first element to its last, and nothing else of the file."""
    if header.numel == 0:
        return torch.empty(header.shape, dtype=header.dtype)
    elements = header.numel
    if span.stride:
        elements = 1 + sum((n - 1) * step for n, step in zip(header.shape, span.stride, strict=True))
    buffer = torch.empty(elements * header.dtype.itemsize, dtype=torch.uint8)
    view = buffer.numpy().data
    file.seek(span.begin)
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]  # an unbuffered file; one call reads 2 GiB at most
        if not count:
            raise CheckpointError(f"ends {plural(len(view), 'byte')} before the end of tensor {header.name!r}")
        view = view[count:]
    tensor = buffer.view(header.dtype)
    if span.stride:
        return tensor.as_strided(header.shape, span.stride).contiguous()
    return tensor.reshape(header.shape)


def _pages(begin: int, end: int) -> tuple[int, int]:
    """Where the pages begin that hold bytes [begin, end) of a file, and how long they are together."""
    first = begin - begin % mmap.PAGESIZE
    return first, end - first
