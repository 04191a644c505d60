"""The programs that round activations to int8, and multiply them with packed weights in integers.

A weight is described as `programs` says. A run of RUN inputs of a row of activations is int8 steps of a size of its
own; what the weight has for them is int8 as well: integers less SHIFT, or the levels of a table, each of which is STEP.
"""

from __future__ import annotations

import triton
import triton.language as tl

from neoquant.kernels.triton.programs import scale_of, words_of

TO_INTEGER = tl.constexpr(1.5 * 2**23)  # added and taken away, leaves the nearest integer, ties to even


@triton.jit
def round_rows(
    x, order, steps, sizes, sums, K, runs, SMALLEST: tl.constexpr, ORDER: tl.constexpr, RUN: tl.constexpr,
    RUNS: tl.constexpr,
):  # fmt: skip
    """Of x[M, K], in `order`: steps int8[M, K], and of each run the size of a step and their sum, float32[M, runs].
    A program has RUNS runs of one row. A run that does not reach SMALLEST is zero."""
    row = tl.program_id(0).to(tl.int64)
    run = tl.program_id(1) * RUNS + tl.arange(0, RUNS)
    k = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    place = k
    if ORDER:
        place = tl.load(order + k, mask=k < K, other=0)
    values = tl.load(x + row * K + place, mask=k < K, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values), axis=1)
    used = largest >= SMALLEST
    step = tl.where(used, tl.math.div_rn(127.0, tl.where(used, largest, 1.0)), 0.0)
    rounded = (values * step[:, None] + TO_INTEGER) - TO_INTEGER
    size = tl.where(used, tl.math.div_rn(largest, 127.0), 0.0) + tl.sum(values * 0.0, axis=1)  # NaN must not be lost
    tl.store(steps + row * K + k, rounded.to(tl.int8), mask=k < K)
    tl.store(sizes + row * runs + run, size, mask=run < runs)
    tl.store(sums + row * runs + run, tl.sum(rounded, axis=1), mask=run < runs)


@triton.jit
def plane(word, p: tl.constexpr, levels, BITS: tl.constexpr, CODES: tl.constexpr, HIGH: tl.constexpr,
          TABLE: tl.constexpr, SIGNED: tl.constexpr, SHIFT: tl.constexpr):  # fmt: skip
    """The integers of plane p of words [R, C], int8."""
    code = (word >> ((CODES - 1 - p) * BITS if HIGH else p * BITS)) & ((1 << BITS) - 1)
    if TABLE:
        flat = tl.reshape(code, (code.shape[0] * code.shape[1],))
        code = tl.reshape(tl.gather(levels, flat, 0), (code.shape[0], code.shape[1]))
    if SIGNED:
        code = (code ^ 128) - 128
    return (code - SHIFT).to(tl.int8)


@triton.jit
def integers_of(word, levels, BITS: tl.constexpr, CODES: tl.constexpr, HIGH: tl.constexpr, TABLE: tl.constexpr,
                SIGNED: tl.constexpr, SHIFT: tl.constexpr):  # fmt: skip
    """All integers of words [R, C], in their order: int8[R, C * CODES]."""
    found = plane(word, 0, levels, BITS, CODES, HIGH, TABLE, SIGNED, SHIFT)
    if CODES == 2:
        found = tl.join(found, plane(word, 1, levels, BITS, CODES, HIGH, TABLE, SIGNED, SHIFT))
    if CODES >= 4:  # what is joined last is what comes next to each other
        H: tl.constexpr = CODES // 4
        even = tl.join(found, plane(word, 2 * H, levels, BITS, CODES, HIGH, TABLE, SIGNED, SHIFT))
        odd = tl.join(
            plane(word, H, levels, BITS, CODES, HIGH, TABLE, SIGNED, SHIFT),
            plane(word, 3 * H, levels, BITS, CODES, HIGH, TABLE, SIGNED, SHIFT),
        )
        found = tl.join(even, odd)
    if CODES == 8:
        even = tl.join(
            plane(word, 1, levels, BITS, CODES, HIGH, TABLE, SIGNED, SHIFT),
            plane(word, 5, levels, BITS, CODES, HIGH, TABLE, SIGNED, SHIFT),
        )
        odd = tl.join(
            plane(word, 3, levels, BITS, CODES, HIGH, TABLE, SIGNED, SHIFT),
            plane(word, 7, levels, BITS, CODES, HIGH, TABLE, SIGNED, SHIFT),
        )
        found = tl.join(found, tl.join(even, odd))
    return tl.reshape(found, (word.shape[0], word.shape[1] * CODES))


@triton.jit
def multiply_rounded(
    steps, sizes, sums, packed, scale, coarse, offset, scale_table, zero, levels, bias, y, M, N, K, row_bytes, groups,
    runs, BITS: tl.constexpr, UNIT: tl.constexpr, CODES: tl.constexpr, HIGH: tl.constexpr, TABLE: tl.constexpr,
    SIGNED: tl.constexpr, SHIFT: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr, SCALING: tl.constexpr,
    FACTOR: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr, RUN: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y[M, N]: rounded rows as `round_rows` leaves them, times the transpose of a weight [N, K]."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    unit_of_tile = tl.arange(0, BK // CODES) * UNIT
    j = tl.arange(0, BK)
    table = tl.arange(0, 16)
    if TABLE:
        table = tl.load(levels + tl.arange(0, 16)).to(tl.int32)
    total = tl.zeros((BM, BN), tl.float32)
    start, row = n.to(tl.int64) * row_bytes, m.to(tl.int64)
    for k in range(0, K, BK):
        unit = k // CODES * UNIT + unit_of_tile
        word = words_of(packed, start[:, None] + unit[None, :], row_bytes - unit[None, :], n[:, None] < N, UNIT)
        integers = tl.trans(integers_of(word, table, BITS, CODES, HIGH, TABLE, SIGNED, SHIFT))
        there = (m[:, None] < M) & (k + j[None, :] < K)
        xs = tl.load(steps + row[:, None] * K + k + j[None, :], mask=there, other=0)
        for r in tl.static_range(BK // RUN):
            run = k // RUN + r
            part = xs
            if BK > RUN:
                part = tl.where((j // RUN == r)[None, :], xs, 0).to(tl.int8)
            sums_of_products = tl.dot(part, integers, out_dtype=tl.int32).to(tl.float32)
            at = n * groups
            if GROUP > 0:
                at += run * RUN // GROUP
            there_n = (n < N) & (tl.zeros_like(n) + run < runs)
            there_m = (m < M) & (tl.zeros_like(m) + run < runs)
            if ZERO:
                behind = tl.load(zero + at, mask=there_n, other=0).to(tl.float32) - SHIFT
                sum_of_steps = tl.load(sums + row * runs + run, mask=there_m, other=0.0)
                sums_of_products -= behind[None, :] * sum_of_steps[:, None]
            scales = scale_of(scale, coarse, offset, scale_table, at, there_n, SCALING, FACTOR)
            if TABLE:
                scales = scales * STEP
            size = tl.load(sizes + row * runs + run, mask=there_m, other=0.0)
            total += sums_of_products * scales[None, :] * size[:, None]
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    mask = (m[:, None] < M) & (n[None, :] < N)
    tl.store(y + row[:, None] * N + n[None, :], total.to(y.dtype.element_ty), mask=mask)
