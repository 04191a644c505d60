"""The columns of one block rounded with error feedback, in C. Everything is on the CPU; the caller sees to shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from neoquant.native.loader import active, threads

LARGEST_HEAD = 1024  # as in feedback.c


class Levels(NamedTuple):
    """Where the values of each column may lie; `width` columns share the scales scale[groups, O], float32.

    Even steps: value = (code - zero[groups, O]) * scale, codes up to `top`. Or a codebook of sixteen: `bounds`
    float32[15] are the midpoints between its sorted values, `order` uint8[16] the codes of the intervals, and `table`
    float32[16] the values by code.
    """

    scale: Tensor
    inverse: Tensor  # 1 / scale, or what stands for it where that is 0
    width: int
    zero: Tensor | None = None
    top: int = 0
    bounds: Tensor | None = None
    order: Tensor | None = None
    table: Tensor | None = None


class Heads(NamedTuple):
    """Rows that hang together: `unit` float32[heads, size, size], `turn` int32[heads, size], and the weights before
    any feedback, `plain` float32[n, O]."""

    unit: Tensor
    turn: Tensor
    plain: Tensor


def refuse(head: int) -> str | None:
    """Why the native library cannot do it for heads of so many rows (0: rows that do not hang together), or None."""
    if head > LARGEST_HEAD:
        return f"heads have {head} rows; native are up to {LARGEST_HEAD}"
    return None if active().library is not None else active().reason


def round_columns(
    work: Tensor, upper: Tensor, levels: Levels, places: Tensor, heads: Heads | None, codes: Tensor
) -> Tensor:
    """Round the columns work[n, O], float32, contiguous, one after the other, correcting those of the block behind.

    `upper` float32[n, n] has contiguous rows; column i of the block is column places[i] of the weight, whose codes go
    to codes[places[i]], uint8[O]. `work` is used up. Returns the errors by their column's diagonal entry, [n, O].
    """
    errors = torch.empty_like(work)
    n, rows = work.shape
    size = 0 if heads is None else heads.turn.shape[1]
    plain, unit, turn = (None, None, None) if heads is None else (heads.plain, heads.unit, heads.turn)
    active().call(
        "nq_feed_back", work.data_ptr(), _address(plain), upper.data_ptr(), upper.stride(0), n, rows,
        places.data_ptr(), levels.scale.data_ptr(), levels.inverse.data_ptr(), _address(levels.zero), levels.width,
        levels.top, _address(levels.bounds), _address(levels.order), _address(levels.table), _address(unit),
        _address(turn), size, codes.data_ptr(), errors.data_ptr(), active().isa, threads(),
    )  # fmt: skip
    return errors


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
