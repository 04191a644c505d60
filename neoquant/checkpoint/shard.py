"""A safetensors file written while its tensors come, one by one, and none is kept.

The header stands before the tensors, whose sizes are not all known when the first is written. So space is reserved
for it, the tensors stream in behind, and what the header does not use is filled with spaces, as the format allows.
Holes between tensors it does not allow, while readers want each tensor aligned to its type: those whose size is no
multiple of eight bytes wait in side files, by the size of their elements, and follow at the end.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import torch

from neoquant.checkpoint.headers import TensorHeader, render_header

_ALIGNMENT = 8
# A line of the header takes about 75 bytes beside the tensor's name, and the names of quantized weights up to 80.
_HEADER_BYTES_PER_TENSOR = 160
_SIDE_FILE_MEMORY = 1 << 20
# Bytes after which the disk is asked to take what it was given, so that it works while more is made, not at the end.
_SYNC_BYTES = 1 << 26


def header_reserve(tensors: int) -> int:
    """Bytes kept free for the header of every shard of a checkpoint with that many tensors."""
    return _aligned(_HEADER_BYTES_PER_TENSOR * (tensors + 1))


class Layout:
    """The order of tensors in a file: those of whole words as they come, then the others from wide to narrow types."""

    def __init__(self) -> None:
        self.lanes: dict[int, list[TensorHeader]] = {8: [], 4: [], 2: [], 1: []}
        self.nbytes = 0

    def takes(self, header: TensorHeader, limit: int) -> bool:
        return self.nbytes == 0 or self.nbytes + header.nbytes <= limit

    def add(self, header: TensorHeader) -> int:
        """Return the tensor's lane: 8 for those written at once, else the size of its elements."""
        lane = _ALIGNMENT if header.nbytes % _ALIGNMENT == 0 else header.dtype.itemsize
        self.lanes[lane].append(header)
        self.nbytes += header.nbytes
        return lane

    def tensors(self) -> Iterator[TensorHeader]:
        for lane in self.lanes.values():
            yield from lane

    def head(self, reserve: int) -> bytes:
        """What stands before the tensors: the header's length and the header, `reserve` bytes long or more."""
        text = render_header(self.tensors())
        text = text.ljust(max(_aligned(len(text)), reserve))
        return len(text).to_bytes(8, "little") + text


class Shard:
    """A safetensors file in the making."""

    def __init__(self, path: Path, reserve: int) -> None:
        self.path = path
        self.layout = Layout()
        self._reserve = reserve
        self._file: IO[bytes] = path.open("wb")
        self._file.seek(8 + reserve)
        self._side_files: dict[int, IO[bytes]] = {}
        self._unsynced = 0

    def takes(self, header: TensorHeader, limit: int) -> bool:
        return self.layout.takes(header, limit)

    def add(self, header: TensorHeader, tensor: torch.Tensor) -> None:
        lane = self.layout.add(header)
        self._lane_file(lane).write(_bytes_of(tensor))
        self._unsynced += header.nbytes
        if self._unsynced >= _SYNC_BYTES:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._unsynced = 0

    def close(self) -> None:
        """Append the side files, fill in the header, and wait until the disk has it all."""
        for _, side_file in sorted(self._side_files.items(), reverse=True):
            side_file.seek(0)
            shutil.copyfileobj(side_file, self._file)
            side_file.close()
        head = self.layout.head(self._reserve)
        if len(head) > 8 + self._reserve:
            self._move_to_wider(len(head))
        self._file.seek(0)
        self._file.write(head)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close the files, wherever they stand; nobody will read them."""
        for file in (self._file, *self._side_files.values()):
            with suppress(OSError):  # flushing to a full disk fails again
                file.close()

    def _lane_file(self, lane: int) -> IO[bytes]:
        if lane == _ALIGNMENT:
            return self._file
        if lane not in self._side_files:
            self._side_files[lane] = tempfile.SpooledTemporaryFile(_SIDE_FILE_MEMORY, dir=str(self.path.parent))  # noqa: SIM115
        return self._side_files[lane]

    def _move_to_wider(self, start: int) -> None:
        """Copy the tensors to a new file where they begin at `start`: the header was longer than foreseen."""
        self._file.close()
        wider = self.path.with_name(f"{self.path.name}-wider")
        with self.path.open("rb") as source, wider.open("wb") as target:
            source.seek(8 + self._reserve)
            target.seek(start)
            shutil.copyfileobj(source, target, 1 << 20)
        wider.replace(self.path)
        self._file = self.path.open("rb+")


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes in row-major order, on the CPU, without a copy where they are that already."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
