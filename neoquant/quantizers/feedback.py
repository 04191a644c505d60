"""Error feedback: each column of a weight is rounded in turn, and its rounding error compensated in the columns that
are not rounded yet, and, where rows are coupled, in the later rows too."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from neoquant.grids import Columns
from neoquant.native import gptq as native
from neoquant.native import trellis
from neoquant.quantizers.hessian import OutputFactor

BLOCK = 128  # columns whose errors are gathered before the columns after them are corrected at once
TALL = 256  # coupled rows that are corrected one by one; more are
ROWS = 64  # gathered, so many at a time, before the rows after them are corrected at once


@dataclass(frozen=True)
class Refit:
    """How a group's parameters are fitted when its first column is reached: the arguments of `Grid.fit`."""

    search: bool
    importance: Tensor | None  # [I]

    def to(self, device: torch.device) -> Refit:
        """The same on another device."""
        return Refit(self.search, None if self.importance is None else self.importance.to(device))


def round_columns(
    weights: Tensor,
    upper: Tensor,
    columns: Columns,
    order: Tensor,
    refit: Refit | None = None,
    output_factor: OutputFactor | None = None,
    block: int = BLOCK,
) -> Tensor:
    """Round one column after the other, compensating errors in those that follow: codes uint8[O, I] in natural order.

    Args:
        weights: the weight's columns as rows, [I, O], in `order`.
        upper: the factor of the inverse Hessian in that order, [I, I].
        columns: the grid; its parameters are fitted on the way if `refit` is given, where columns are grouped.
        order: int64[I], which column of the weight stands in each row of `weights`; natural if `refit` is given.
        output_factor: how errors are compensated within the rows of a head, if they are.
        block: columns that are rounded before those after them are corrected, as one matrix product (section 3.3,
            "lazy batch-updates"). Changes only the speed.
    """
    original, weights = weights, weights.clone(memory_format=torch.contiguous_format)
    upper = upper.to(weights.dtype).contiguous()
    codes = torch.empty(weights.shape, dtype=torch.uint8, device=weights.device)
    width = len(weights) if refit is None or columns.width is None else min(columns.width, len(weights))
    if width < len(weights):  # a group is fitted when all errors before it are compensated
        block = math.gcd(block, width)
    round_block = _round_block
    if is_native(weights, columns):
        round_block = _round_tall if output_factor is not None and output_factor.size > TALL else _round_native
    for start in range(0, len(weights), block):
        stop = min(start + block, len(weights))
        if refit is not None and columns.width is not None and start % width == 0:
            end = min(start + width, len(weights))
            importance = None if refit.importance is None else refit.importance[start:end]
            columns.refit(start, weights[start:end].T, refit.search, importance)
        corner = upper[start:stop, start:stop]
        heads = None if output_factor is None else (output_factor, original[start:stop])
        errors = round_block(weights[start:stop], corner, columns, order[start:stop], heads, codes)
        if stop < len(weights):
            weights[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return codes.T.contiguous()


def _round_block(
    weights: Tensor,
    upper: Tensor,
    columns: Columns,
    order: Tensor,
    heads: tuple[OutputFactor, Tensor] | None,
    codes: Tensor,
) -> Tensor:
    """A block of `round_columns` in torch: writes codes[I, O], returns the errors over the diagonal, [n, O].

    `heads` are the output factor and the block's columns before any compensation, [n, O].
    """
    errors = torch.empty_like(weights)
    diagonal = upper.diagonal().tolist()
    for i, column in enumerate(order.tolist()):
        if heads is None:
            codes[column], values = columns.round(column, weights[i])
        else:
            values, compensation = _round_heads(weights[i], heads[0], heads[1][i], columns, column, codes[column])
            weights[i] += compensation
        torch.sub(weights[i], values, out=errors[i]).div_(diagonal[i])
        weights[i + 1 :].addr_(upper[i, i + 1 :], errors[i], alpha=-1)
    return errors


def _round_heads(
    w: Tensor, factor: OutputFactor, original: Tensor, columns: Columns, column: int, codes: Tensor
) -> tuple[Tensor, Tensor]:
    """One column w[O], row after row of all heads at once: the values, and each row's compensation for the rows before
    it, [O]."""
    heads, size = factor.row_order.shape
    rows = factor.row_order + torch.arange(heads, device=w.device)[:, None] * size
    values, compensation = torch.empty_like(w), w.new_zeros(heads, size)
    for i in range(size):
        row = rows[:, i]
        codes[row], values[row] = columns.round(column, w[row] + compensation[:, i], row)
        error = original[row] + compensation[:, i] - values[row]
        compensation[:, i + 1 :] -= error[:, None] * factor.unit[:, i, i + 1 :]
    in_place = torch.empty_like(w)
    in_place[rows] = compensation
    return values, in_place


def is_native(weights: Tensor, columns: Columns) -> bool:
    """Whether the native library rounds these columns, float32[I, O]."""
    if weights.dtype != torch.float32 or weights.device.type != "cpu" or columns.levels() is None:
        return False
    return native.refuse() is None


def _round_native(
    weights: Tensor,
    upper: Tensor,
    columns: Columns,
    order: Tensor,
    heads: tuple[OutputFactor, Tensor] | None,
    codes: Tensor,
) -> Tensor:
    """The same in C."""
    levels = columns.levels()
    if isinstance(levels, trellis.Paths):
        assert heads is None, "rows that a trellis chains are not coupled otherwise"
        errors = trellis.round_columns(weights, upper, levels, order, codes)
        assert errors is not None
        return errors
    assert isinstance(levels, native.Levels)
    coupled = None
    if heads is not None:
        factor, original = heads
        coupled = native.Heads(factor.unit.float(), factor.row_order.int(), original.contiguous())
    return native.round_columns(weights, upper, levels, order, coupled, codes)


def _round_tall(
    weights: Tensor,
    upper: Tensor,
    columns: Columns,
    order: Tensor,
    heads: tuple[OutputFactor, Tensor] | None,
    codes: Tensor,
) -> Tensor:
    """The same in C, of heads with many rows: some rows at a time, whose errors then correct the rows after them as one
    matrix product."""
    levels = columns.levels()
    assert isinstance(levels, native.Levels) and heads is not None
    factor, original = heads
    size, diagonal = factor.size, upper.diagonal()[:, None]
    first = torch.arange(len(factor.row_order))[:, None] * size
    rows, places = (factor.row_order + first).flatten(), torch.arange(weights.shape[1])
    targets, aims = weights.index_select(1, rows), original.index_select(1, rows)  # rows as they are rounded
    levels = levels.of_rows(rows)
    found, errors = torch.empty_like(targets, dtype=torch.uint8), torch.empty_like(targets)
    for head, unit in enumerate(factor.unit.float()):
        compensation = weights.new_zeros(len(weights), size)  # [n, D]
        for start in range(0, size, ROWS):
            stop = min(start + ROWS, size)
            part, corner = slice(head * size + start, head * size + stop), unit[start:stop, start:stop]
            target, aim = (each[:, part] + compensation[:, start:stop] for each in (targets, aims))
            coupled = native.Heads(corner[None].contiguous(), torch.arange(stop - start, dtype=torch.int32)[None], aim)
            rounded = torch.empty(len(codes), stop - start, dtype=torch.uint8)
            scaled = native.round_columns(target, upper, levels.of_rows(places[part]), order, coupled, rounded)
            found[:, part], errors[:, part] = rounded[order], scaled
            if stop < size:  # what each row's value lacks of what it was to be, errors before it included
                lacking = aim.sub_(target).addcmul_(scaled, diagonal)
                compensation[:, stop:].addmm_(lacking, unit[start:stop, stop:], alpha=-1)
    back = rows.argsort()
    codes[order] = found.index_select(1, back)
    return errors.index_select(1, back)
