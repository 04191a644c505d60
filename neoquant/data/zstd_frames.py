"""Zstandard files read piece by piece: in bounded memory, and never short of what they hold."""

from __future__ import annotations

import io
from typing import Any, BinaryIO

from neoquant.errors import DataError

MAX_WINDOW = 1 << 31
"""Bytes that a frame may refer back to: what `zstd --long=31` writes, the most that the format's tools allow."""

# A block of four bytes may stand for 128 KiB. So this many bytes at once become 32 MiB at most.
_PIECE = 1024


class ZstdFrames(io.RawIOBase):
    """The content of all frames of a zstandard file, one after the other (RFC 8878, section 3).

    A frame that the file ends in the middle of is an error, also where it ends between two of the frame's blocks.

    Raises DataError for that, and zstandard.ZstdError for what is no frame.
    """

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._file = file
        self._zstd = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        self._frame: Any = None  # a decompressor, once the first byte of a frame was read
        self._read = memoryview(b"")  # of the file, not yet decompressed
        self._content = memoryview(b"")  # decompressed, not yet handed out

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            if not self._read and not self._fill():
                return 0
            self._frame = self._frame or self._zstd.decompressobj()
            self._content = memoryview(self._frame.decompress(self._read))
            self._read = memoryview(b"")
            if self._frame.eof:
                self._read, self._frame = memoryview(self._frame.unused_data), None
        count = min(len(buffer), len(self._content))
        memoryview(buffer).cast("B")[:count] = self._content[:count]
        self._content = self._content[count:]
        return count

    def _fill(self) -> bool:
        """Read on in the file; False at its end."""
        self._read = memoryview(self._file.read(_PIECE))
        if not self._read and self._frame is not None:
            raise DataError("not a whole zstandard file: it ends in the middle of a frame")
        return bool(self._read)
