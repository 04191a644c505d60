"""GPTQ on the columns of one block, in C. Every tensor is on the CPU; the caller sees to shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from neoquant.native.loader import active, address, threads


class Levels(NamedTuple):
    """The quantization levels of each column; `width` columns share the scales scale[groups, O], float32.

    Even steps: value = (code - zero[groups, O]) * scale, codes up to `top`. Or a codebook of sixteen: `bounds`
    float32[15] are the midpoints between its sorted values, `order` uint8[16] the codes of the intervals, and `table`
    float32[16] the values by code. Or, without both, codes in two's complement from -top to top, of float16 weights.
    """

    scale: Tensor
    inverse: Tensor  # 1 / scale, or what stands for it where that is 0
    width: int
    zero: Tensor | None = None
    top: int = 0
    bounds: Tensor | None = None
    order: Tensor | None = None
    table: Tensor | None = None

    @property
    def is_signed(self) -> bool:
        """Whether codes are in two's complement."""
        return self.zero is None and self.bounds is None

    def of_rows(self, rows: Tensor) -> Levels:
        """Those of `rows`, int64[R], of every column."""
        scale, inverse = self.scale.index_select(1, rows), self.inverse.index_select(1, rows)
        return self._replace(
            scale=scale, inverse=inverse, zero=None if self.zero is None else self.zero[:, rows].contiguous()
        )


class Heads(NamedTuple):
    """Rows whose errors are compensated in later rows of the same attention head.

    `unit` float32[heads, D, D] and `row_order` int64[heads, D] are those of `quantizers.hessian.OutputFactor`;
    `original` float32[n, O] holds the block's columns before any compensation.
    """

    unit: Tensor
    row_order: Tensor
    original: Tensor


def refuse(levels: Levels) -> str | None:
    """Why the native library cannot round columns on these levels, or None."""
    if levels.is_signed:
        return "the native library rounds int8 rows as a whole only"
    return None if active().library is not None else active().reason


def round_columns(
    weights: Tensor, upper: Tensor, levels: Levels, columns: Tensor, heads: Heads | None, codes: Tensor
) -> Tensor:
    """Round the columns weights[n, O] one after the other, compensating each one's error in the later ones.

    Args:
        weights: float32, contiguous, a column of the weight matrix in each row; overwritten.
        upper: float32[n, n] with contiguous rows, the block of the inverse Hessian's factor.
        columns: int64[n], where each stands in the weight matrix.
        codes: uint8[I, O]; row columns[i] receives the codes of column i.

    Returns:
        Each column's rounding error divided by its diagonal entry of `upper`, float32[n, O].
    """
    errors = torch.empty_like(weights)
    n, rows = weights.shape
    size = 0 if heads is None else heads.row_order.shape[1]
    unit, row_order, original = (None, None, None) if heads is None else heads
    row_order = None if row_order is None else row_order.int()
    active().call(
        "nq_gptq_block", weights.data_ptr(), address(original), upper.data_ptr(), upper.stride(0), n, rows,
        columns.data_ptr(), levels.scale.data_ptr(), levels.inverse.data_ptr(), address(levels.zero), levels.width,
        levels.top, address(levels.bounds), address(levels.order), address(levels.table), address(unit),
        address(row_order), size, codes.data_ptr(), errors.data_ptr(), active().isa, threads(),
    )  # fmt: skip
    return errors
