"""The program that rounds a block of columns by GPTQ (Frantar et al., arXiv:2210.17323)."""

from __future__ import annotations

import triton
import triton.language as tl

TO_INTEGER = tl.constexpr(1.5 * 2**23)  # added and taken away, leaves the nearest integer, ties to even
AT_ONCE = tl.constexpr(8)  # loads that do not wait for each other


@triton.jit
def round_on_levels(w, at, mask, scale, inverse, zero, bounds, order, table, KIND: tl.constexpr, TOP: tl.constexpr):
    """The codes, int32, of the values nearest to w, and these values; `at` are the places of their scales."""
    size = tl.load(scale + at, mask=mask, other=0.0)
    steps = tl.load(inverse + at, mask=mask, other=0.0)
    if KIND == 0:  # even steps
        middle = tl.load(zero + at, mask=mask, other=0.0)
        whole = (middle + TO_INTEGER) - TO_INTEGER
        number = ((w * steps + (middle - whole)) + TO_INTEGER) - TO_INTEGER + whole
        number = tl.minimum(tl.maximum(number, 0.0), TOP)
        value = (number - middle) * size
        code = number.to(tl.int32)
    elif KIND == 1:  # sixteen values
        scaled = w * steps
        rank = tl.zeros_like(at)
        for i in tl.static_range(15):
            rank += (scaled > tl.load(bounds + i)).to(rank.dtype)
        code = tl.load(order + rank).to(tl.int32)
        value = tl.load(table + code) * size
    else:  # int8 rows, of float16 weights
        number = w.to(tl.float16).to(tl.float32) * steps
        number = tl.where(number == number, number, 0.0)  # of a row of zeros
        number = (tl.minimum(tl.maximum(number, -TOP), TOP) + TO_INTEGER) - TO_INTEGER
        value = number * size
        code = number.to(tl.int32) & 255
    return code, value


@triton.jit
def round_columns(
    weights, original, upper, places, scale, inverse, zero, bounds, order, table, unit, row_order, lacking, codes,
    errors, n, rows, stride, width, head, KIND: tl.constexpr, TOP: tl.constexpr, COUPLED: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Rounds weights[n, rows], the columns of a block as rows: see `gptq.round_columns`. A lane has one of the rows.

    COUPLED: a program has one head, whose rows are coupled, so that a column of a row waits for the columns before it
    and for the rows before it in that column. All of which are known once the lane before is one column ahead: lane i
    is at column t - i in step t, and the block takes n + head - 1 steps, not n * head. Otherwise all lanes are at
    column t. Sums run in the order of a loop over columns and rows, so that they are rounded alike.
    """
    lane = tl.arange(0, LANES)
    first = tl.program_id(0) * head
    if COUPLED:
        row = first + tl.load(row_order + first + lane, mask=lane < head, other=0).to(tl.int32)
        known = lane < head
        steps = n + head - 1
    else:
        row = tl.program_id(0) * LANES + lane
        known = row < rows
        steps = n
    for t in range(steps):
        column = t + tl.zeros_like(lane)
        if COUPLED:
            column = t - lane
        live = known & (column >= 0) & (column < n)
        w = tl.load(weights + column * rows + row, mask=live, other=0.0)
        above, earlier = upper + column, errors + row
        for start in range(0, tl.minimum(t, n), AT_ONCE):
            for ahead in tl.static_range(AT_ONCE):
                i = start + ahead
                before = live & (i < column)
                part = tl.load(above + i * stride, mask=before, other=0.0)
                w -= part * tl.load(earlier + i * rows, mask=before, other=0.0)
        tl.store(weights + column * rows + row, w, mask=live)
        compensation = tl.zeros((LANES,), tl.float32)
        if COUPLED:
            left, lack = unit + first * head + lane, lacking + first * n + column
            for start in range(0, tl.minimum(t, head - 1), AT_ONCE):
                for ahead in tl.static_range(AT_ONCE):
                    i = start + ahead
                    before = live & (i < lane)
                    part = tl.load(left + i * head, mask=before, other=0.0)
                    compensation -= tl.load(lack + i * n, mask=before, other=0.0) * part
        target = w + compensation
        place = tl.load(places + column, mask=live, other=0)
        at = place // width * rows + row
        code, value = round_on_levels(target, at, live, scale, inverse, zero, bounds, order, table, KIND, TOP)
        diagonal = tl.load(upper + column * stride + column, mask=live, other=1.0)
        tl.store(errors + column * rows + row, tl.math.div_rn(target - value, diagonal), mask=live)
        tl.store(codes + place * rows + row, code.to(tl.uint8), mask=live)
        if COUPLED:
            aim = tl.load(original + column * rows + row, mask=live, other=0.0)
            tl.store(lacking + (first + lane) * n + column, (aim + compensation) - value, mask=live)
            tl.debug_barrier()  # the next step's lanes read what these wrote
