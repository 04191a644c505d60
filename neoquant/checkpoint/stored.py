"""A stored tensor and where it is."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from neoquant.checkpoint.headers import TensorHeader


class Span(NamedTuple):
    """Where a tensor lies in a file: its first byte, and the elements from one index to the next along each axis.

    A stride of () says that the tensor lies row by row, without gaps.
    """

    begin: int
    stride: tuple[int, ...]


class Stored(NamedTuple):
    """A tensor and where it is: in a file, or (of the few files that must be loaded whole) in memory."""

    header: TensorHeader
    file: Path
    place: Span | torch.Tensor

    @property
    def identity(self) -> object:
        """Equal for tensors that are the same bytes of the same file."""
        where = self.place
        if isinstance(where, torch.Tensor):
            return self.file, self.header.dtype, self.header.shape, where.data_ptr(), where.stride()
        return self.file, self.header.dtype, self.header.shape, where
