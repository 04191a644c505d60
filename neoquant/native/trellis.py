"""The codes of columns on a trellis, in C. Every tensor is on the CPU; the caller sees to shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from neoquant.native.loader import active, address, threads


class Paths(NamedTuple):
    """Where the values of each column may lie; `width` columns share the scales scale[groups, O], float32.

    Codes have `bits` bits, 2 or 3. The value of a state is `table` float32[2**(bits + 2)] at its place in `levels`
    uint8[4096], times the scale. A squared error of one scale costs importance[groups, O], float32; costs are whole
    numbers that end at 65535.
    """

    scale: Tensor
    importance: Tensor
    width: int
    bits: int
    levels: Tensor
    table: Tensor


class Coupled(NamedTuple):
    """Rows whose errors are compensated in later rows of their span.

    `unit` float32[spans, 256, 256] and `price` float32[O] are those of `quantizers.hessian.SpanFactor`; `original`
    float32[n, O] holds the block's columns before any compensation.
    """

    unit: Tensor
    price: Tensor
    original: Tensor


def refuse() -> str | None:
    """Why the native library cannot search a trellis, or None."""
    return None if active().library is not None else active().reason


def round_columns(
    weights: Tensor,
    upper: Tensor | None,
    paths: Paths,
    columns: Tensor,
    codes: Tensor,
    coupled: Coupled | None = None,
) -> Tensor | None:
    """The codes of the columns weights[n, O] of least squared error, each error compensated in the later columns.

    Args:
        weights: float32, contiguous, a column of the weight matrix in each row; overwritten with `upper`.
        upper: float32[n, n] with contiguous rows, the block of the inverse Hessian's factor; None compensates nothing.
        columns: int64[n], where each stands in the weight matrix.
        codes: uint8[I, O]; row columns[i] receives the codes of column i.
        coupled: how errors are compensated within a span as well, if they are; with `upper` only. Their codes are then
            those of little error, found by a beam search.

    Returns:
        Each column's error divided by its diagonal entry of `upper`, float32[n, O]; None without `upper`.
    """
    errors = None if upper is None else torch.empty_like(weights)
    unit, price, original = (None, None, None) if coupled is None else coupled
    n, rows = weights.shape
    active().call(
        "nq_trellis_block", weights.data_ptr(), address(upper), 0 if upper is None else upper.stride(0), n, rows,
        columns.data_ptr(), paths.scale.data_ptr(), paths.importance.data_ptr(), paths.width, paths.bits,
        paths.levels.data_ptr(), paths.table.data_ptr(), codes.data_ptr(), address(errors), address(original),
        address(unit), address(price), active().isa, threads(),
    )  # fmt: skip
    return errors
