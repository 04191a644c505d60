"""Keys or values of a layer as a cache holds them: in their own type, in float16, or in int8 with a scale."""

from __future__ import annotations

import torch
from torch import Tensor

STORAGES = ("float32", "float16", "int8")
MIDDLE = 128
"""The code that stands for 0 in int8: codes are held without a sign."""

SMALLEST = 1e-37
"""What a step must be above: vectors of less are held as 0."""

_TYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.uint8}


def bytes_a_head(size: int, storage: str) -> int:
    """Of one head at one position, `size` numbers."""
    scale = 4 if storage == "int8" else 0
    return size * _TYPES[storage].itemsize + scale


class StoredStates:
    """A buffer `[B, H, capacity, D]`, `data`; with int8 also `scale` float32 `[B, H, capacity]`.

    int8 rounds each head's vector at each position to whole steps of its own: the largest magnitude is 127 of them. A
    vector with NaN or infinity is read as NaN, not as something that could be taken for a result.
    """

    def __init__(self, data: Tensor, scale: Tensor | None = None, made: bool = False) -> None:
        """`made`: the buffer is a cache's own, and may be written to."""
        self.data, self.scale, self.made = data, scale, made
        self.capacity = data.shape[2]

    @classmethod
    def empty(cls, shape: tuple[int, ...], capacity: int, like: Tensor, storage: str | None) -> StoredStates:
        """Room for `capacity` positions of `shape` (B, H, T, D), on the device of `like`; None is its type."""
        B, H, _, D = shape
        dtype = like.dtype if storage is None else _TYPES[storage]
        data = torch.empty(B, H, capacity, D, dtype=dtype, device=like.device)
        scale = torch.empty(B, H, capacity, device=like.device) if storage == "int8" else None
        return cls(data, scale, made=True)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def write(self, at: int, states: Tensor) -> None:
        """`states[B, H, T, D]` to positions from `at` on."""
        end = at + states.shape[2]
        if self.scale is None:
            self.data[:, :, at:end] = states
            return
        states = states.float()
        scale = states.abs().amax(-1) / 127  # NaN where any is
        scale = scale.where(scale.isfinite(), torch.nan)
        steps = states * torch.where(scale > SMALLEST, 1 / scale, 0.0)[..., None]
        self.data[:, :, at:end] = (steps.nan_to_num(0, 0, 0).round() + MIDDLE).to(torch.uint8)
        self.scale[:, :, at:end] = scale

    def read(self, end: int, dtype: torch.dtype) -> Tensor:
        """The first `end` positions, `[B, H, end, D]`: a view where they are held in that type."""
        data = self.data[:, :, :end]
        if self.scale is None:
            return data.to(dtype)
        return ((data.float() - MIDDLE) * self.scale[:, :, :end, None]).to(dtype)

    def copy(self, source: StoredStates, begin: int, count: int) -> None:
        """`count` positions of `source` from `begin` on become the first ones; it may be this buffer itself."""
        pairs = [(self.data, source.data)]
        if self.scale is not None:
            if source.scale is None:  # held as they came, for gradients
                self.write(0, source.data[:, :, begin : begin + count])
                return
            pairs.append((self.scale, source.scale))
        for to, from_ in pairs:
            part = from_[:, :, begin : begin + count]
            to[:, :, :count] = part.clone() if to is from_ and begin < count else part

    def select(self, rows: Tensor) -> StoredStates:
        """The rows of the batch named by int64[rows]."""
        scale = None if self.scale is None else self.scale.index_select(0, rows.to(self.scale.device))
        return StoredStates(self.data.index_select(0, rows.to(self.data.device)), scale, made=True)
