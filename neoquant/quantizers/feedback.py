"""Error feedback: each column of a weight is rounded in turn, and its rounding error compensated in the columns that
are not rounded yet, and, where rows are coupled, in the later rows too."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from neoquant.grids import Columns
from neoquant.native import gptq as native
from neoquant.native import trellis
from neoquant.quantizers.hessian import OutputFactor, SpanFactor
from neoquant.triton import gptq as triton

Coupling = tuple[OutputFactor | SpanFactor, Tensor]
"""The output factor, and a block's columns before any compensation, [n, O]."""

RoundBlock = Callable[[Tensor, Tensor, native.Levels, Tensor, native.Heads | None, Tensor], Tensor]
"""`native.gptq.round_columns`, and what does the same elsewhere."""

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
    output_factor: OutputFactor | SpanFactor | None = None,
    block: int = BLOCK,
) -> Tensor:
    """Round one column after the other, compensating errors in those that follow: codes uint8[O, I] in natural order.

    Args:
        weights: the weight's columns as rows, [I, O], in `order`.
        upper: the factor of the inverse Hessian in that order, [I, I].
        columns: the grid; its parameters are fitted on the way if `refit` is given, where columns are grouped.
        order: int64[I], which column of the weight stands in each row of `weights`; natural if `refit` is given.
        output_factor: how errors are compensated within the rows of a head, if they are; of a span on a trellis, which
            the native library rounds.
        block: columns that are rounded before those after them are corrected, as one matrix product (section 3.3,
            "lazy batch-updates"). Changes only the speed.
    """
    original = weights if output_factor is None else weights.contiguous()
    weights = weights.clone(memory_format=torch.contiguous_format)
    upper = upper.to(weights.dtype).contiguous()
    if isinstance(output_factor, OutputFactor):
        output_factor = OutputFactor(output_factor.unit.to(weights.dtype), output_factor.row_order)
    codes = torch.empty(weights.shape, dtype=torch.uint8, device=weights.device)
    width = len(weights) if refit is None or columns.width is None else min(columns.width, len(weights))
    if width < len(weights):  # a group is fitted when all errors before it are compensated
        block = math.gcd(block, width)
    round_block = whole_block(weights, columns) or _round_block
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
    heads: Coupling | None,
    codes: Tensor,
) -> Tensor:
    """A block of `round_columns` in torch: writes codes[I, O], returns the errors over the diagonal, [n, O]."""
    errors = torch.empty_like(weights)
    diagonal = upper.diagonal().tolist()
    for i, column in enumerate(order.tolist()):
        if heads is None:
            codes[column], values = columns.round(column, weights[i])
        else:
            assert isinstance(heads[0], OutputFactor)
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


def whole_block(weights: Tensor, columns: Columns) -> Callable[..., Tensor] | None:
    """What rounds a block of these columns, float32[I, O], in one call, as `_round_block`: the native library on a CPU,
    a program of Triton on a GPU; None where neither can."""
    levels = columns.levels()
    if weights.dtype != torch.float32 or levels is None:
        return None
    if isinstance(levels, trellis.Paths):
        return _round_paths if weights.device.type == "cpu" and trellis.refuse() is None else None
    if weights.device.type == "cuda":
        return None if triton.refuse() else partial(_round_levels, triton.round_columns)
    return None if native.refuse(levels) else partial(_round_levels, native.round_columns)


def _round_paths(
    weights: Tensor, upper: Tensor, columns: Columns, order: Tensor, heads: Coupling | None,
    codes: Tensor,
) -> Tensor:  # fmt: skip
    """A block of columns on a trellis, in C."""
    levels = columns.levels()
    assert isinstance(levels, trellis.Paths)
    coupled = None
    if heads is not None:
        factor, original = heads
        assert isinstance(factor, SpanFactor)
        coupled = trellis.Coupled(factor.unit, factor.price, original.contiguous())
    errors = trellis.round_columns(weights, upper, levels, order, codes, coupled)
    assert errors is not None
    return errors


def _round_levels(
    round_block: RoundBlock, weights: Tensor, upper: Tensor, columns: Columns, order: Tensor,
    heads: Coupling | None, codes: Tensor,
) -> Tensor:  # fmt: skip
    """A block of columns in one call; of heads with many rows, in one for some rows of each."""
    levels = columns.levels()
    assert isinstance(levels, native.Levels)
    if heads is None:
        return round_block(weights, upper, levels, order, None, codes)
    factor, original = heads
    assert isinstance(factor, OutputFactor)
    if factor.size > TALL:
        return _round_tall(round_block, weights, upper, levels, order, factor, original, codes)
    coupled = native.Heads(factor.unit, factor.row_order, original)
    return round_block(weights, upper, levels, order, coupled, codes)


def _round_tall(
    round_block: RoundBlock, weights: Tensor, upper: Tensor, levels: native.Levels, order: Tensor,
    factor: OutputFactor, original: Tensor, codes: Tensor,
) -> Tensor:  # fmt: skip
    """The same of heads with many rows: some rows at a time, whose errors then correct the rows after them as one
    matrix product."""
    device, size, diagonal = weights.device, factor.size, upper.diagonal()[:, None]
    first = torch.arange(len(factor.row_order), device=device)[:, None] * size
    rows, places = (factor.row_order + first).flatten(), torch.arange(weights.shape[1], device=device)
    natural = torch.arange(ROWS, device=device)
    targets, aims = weights.index_select(1, rows), original.index_select(1, rows)  # rows as they are rounded
    levels = levels.of_rows(rows)
    found, errors = torch.empty_like(targets, dtype=torch.uint8), torch.empty_like(targets)
    for head, unit in enumerate(factor.unit):
        compensation = weights.new_zeros(len(weights), size)  # [n, D]
        for start in range(0, size, ROWS):
            stop = min(start + ROWS, size)
            part, corner = slice(head * size + start, head * size + stop), unit[start:stop, start:stop]
            target, aim = (each[:, part] + compensation[:, start:stop] for each in (targets, aims))
            coupled = native.Heads(corner[None].contiguous(), natural[None, : stop - start], aim)
            rounded = torch.empty(len(codes), stop - start, dtype=torch.uint8, device=device)
            scaled = round_block(target, upper, levels.of_rows(places[part]), order, coupled, rounded)
            found[:, part], errors[:, part] = rounded[order], scaled
            if stop < size:  # what each row's value lacks of what it was to be, errors before it included
                lacking = aim.sub_(target).addcmul_(scaled, diagonal)
                compensation[:, stop:].addmm_(lacking, unit[start:stop, stop:], alpha=-1)
    back = rows.argsort()
    codes[order] = found.index_select(1, back)
    return errors.index_select(1, back)
