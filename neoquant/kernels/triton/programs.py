"""The programs that Triton compiles: products with packed weights, rows of them, and whole weights decoded.

A weight [N, K] is described by constants, which `arrangement` reads off a grid's `Decoding`:

    BITS      of a code; UNIT bytes hold CODES codes, the first in the lowest bits, or (HIGH) in the highest
    TABLE     codes are looked up in 16 numbers, which a program holds in registers; else they are integers, two's
              complement (SIGNED), less MIDDLE
    GROUP     inputs that share a scale; 0: all of a row
    SCALING   0: a stored scale; 1: a byte looked up; 2: that, times a scale of 256 scales, plus an offset
    FACTOR    of the scale
    ZERO      whether each group has a zero, a byte

Where products run, no group crosses a row (ALIGNED in `decode`). Codes are taken apart in planes: plane p holds the
codes p, p + CODES, p + 2 CODES, ... of a row, and meets those inputs, so that nothing is moved between lanes. Sums are
float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale_of(scale, coarse, offset, scale_table, at, mask, SCALING: tl.constexpr, FACTOR: tl.constexpr):
    """The scales of groups by their numbers, float32."""
    stored = tl.load(scale + at, mask=mask, other=0)
    if SCALING == 0:
        found = stored.to(tl.float32)
        if FACTOR != 1.0:
            found = found * FACTOR
    else:
        found = tl.load(scale_table + stored.to(tl.int32))
        if SCALING == 2:
            found = found * tl.load(coarse + at // 256, mask=mask, other=0.0) + tl.load(offset)
    return found


@triton.jit
def number_of(word, p: tl.constexpr, numbers, BITS: tl.constexpr, CODES: tl.constexpr, HIGH: tl.constexpr,
              TABLE: tl.constexpr, SIGNED: tl.constexpr, MIDDLE: tl.constexpr):  # fmt: skip
    """The numbers of plane p of words [R, C], float32."""
    code = (word >> ((CODES - 1 - p) * BITS if HIGH else p * BITS)) & ((1 << BITS) - 1)
    if TABLE:
        flat = tl.reshape(code, (code.shape[0] * code.shape[1],))
        return tl.reshape(tl.gather(numbers, flat, 0), (code.shape[0], code.shape[1]))
    if SIGNED:
        code = (code ^ 128) - 128
    return (code - MIDDLE).to(tl.float32)


@triton.jit
def words_of(packed, first, left, mask, UNIT: tl.constexpr):
    """UNIT bytes from each place, as one integer, the first lowest; `left` of them belong to the row."""
    word = tl.load(packed + first, mask=mask & (left > 0), other=0).to(tl.int32)
    if UNIT == 3:
        word |= tl.load(packed + first + 1, mask=mask & (left > 1), other=0).to(tl.int32) << 8
        word |= tl.load(packed + first + 2, mask=mask & (left > 2), other=0).to(tl.int32) << 16
    return word


@triton.jit
def finish(total, at, columns, mask, bias, residual, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
           RESIDUAL: tl.constexpr):  # fmt: skip
    """What follows a product: a bias, GELU as GPT-Neo has it (by tanh), what is added to it."""
    if BIAS:
        total += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == 1:
        inner = 0.7978845608028654 * (total + 0.044715 * total * total * total)
        # tanh(z) = 1 - 2 / (1 + exp(2 z)), which neither overflows nor needs a library
        total = 0.5 * total * (2.0 - 2.0 / (1.0 + tl.exp(2.0 * inner)))
    if RESIDUAL:
        total += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def multiply_few(
    x, order, packed, scale, coarse, offset, scale_table, zero, numbers, bias, residual, y, M, N, K, row_bytes, groups,
    BITS: tl.constexpr, UNIT: tl.constexpr, CODES: tl.constexpr, HIGH: tl.constexpr, TABLE: tl.constexpr,
    SIGNED: tl.constexpr, MIDDLE: tl.constexpr, GROUP: tl.constexpr, SCALING: tl.constexpr, FACTOR: tl.constexpr,
    ZERO: tl.constexpr, ORDER: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y[M, N] = x[M, K] W[N, K]^T for M up to BM: a program has BN rows of W and reads each byte of them once."""
    U: tl.constexpr = BK // CODES
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    u = tl.arange(0, U)
    table = tl.arange(0, 16).to(tl.float32)
    if TABLE:
        table = tl.load(numbers + tl.arange(0, 16))
    total = tl.zeros((BM, BN), tl.float32)
    seen = tl.zeros((BM, 1), tl.float32)
    start = n.to(tl.int64) * row_bytes
    for k in range(0, K, BK):
        unit = k // CODES * UNIT + u * UNIT
        word = words_of(packed, start[:, None] + unit[None, :], row_bytes - unit[None, :], n[:, None] < N, UNIT)
        part = tl.zeros((BM, BN, U), tl.float32)
        inputs = tl.zeros((BM, U), tl.float32)
        for p in tl.static_range(CODES):
            column = k + u * CODES + p
            known = (m[:, None] < M) & (column[None, :] < K)
            if ORDER:
                column = tl.load(order + column, mask=column < K, other=0)
            xs = tl.load(x + m[:, None] * K + column[None, :], mask=known, other=0.0).to(tl.float32)
            values = number_of(word, p, table, BITS, CODES, HIGH, TABLE, SIGNED, MIDDLE)
            part += xs[:, None, :] * values[None, :, :]
            inputs += xs
        if GROUP == 0:
            total += tl.sum(part, axis=2)
            if ZERO:
                seen += tl.sum(inputs, axis=1)[:, None]
        else:
            WIDTH: tl.constexpr = GROUP if GROUP < BK else BK
            G: tl.constexpr = BK // WIDTH
            g = k // GROUP + tl.arange(0, G)
            there = (n[:, None] < N) & (g[None, :] < groups)
            at = n[:, None] * groups + g[None, :]
            sums = tl.sum(tl.reshape(part, (BM, BN, G, WIDTH // CODES)), axis=3)
            if ZERO:
                behind = tl.load(zero + at, mask=there, other=0).to(tl.float32)
                shares = tl.sum(tl.reshape(inputs, (BM, G, WIDTH // CODES)), axis=2)
                sums -= behind[None, :, :] * shares[:, None, :]
            scales = scale_of(scale, coarse, offset, scale_table, at, there, SCALING, FACTOR)
            total += tl.sum(sums * scales[None, :, :], axis=2)
    if GROUP == 0:
        if ZERO:
            total -= tl.load(zero + n, mask=n < N, other=0).to(tl.float32)[None, :] * seen
        total *= scale_of(scale, coarse, offset, scale_table, n, n < N, SCALING, FACTOR)[None, :]
    mask = (m[:, None] < M) & (n[None, :] < N)
    at = m[:, None] * N + n[None, :]
    total = finish(total, at, n[None, :], mask, bias, residual, BIAS, ACTIVATION, RESIDUAL)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def multiply_some(
    x, order, packed, scale, coarse, offset, scale_table, zero, numbers, bias, residual, y, M, N, K, row_bytes, groups,
    BITS: tl.constexpr, UNIT: tl.constexpr, CODES: tl.constexpr, HIGH: tl.constexpr, TABLE: tl.constexpr,
    SIGNED: tl.constexpr, MIDDLE: tl.constexpr, GROUP: tl.constexpr, SCALING: tl.constexpr, FACTOR: tl.constexpr,
    ZERO: tl.constexpr, ORDER: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The same with the tensor cores, for M of 5 to some 64: W is decoded tile by tile into x's type."""
    U: tl.constexpr = BK // CODES
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    u = tl.arange(0, U)
    table = tl.arange(0, 16).to(tl.float32)
    if TABLE:
        table = tl.load(numbers + tl.arange(0, 16))
    total = tl.zeros((BM, BN), tl.float32)
    start = n.to(tl.int64) * row_bytes
    for k in range(0, K, BK):
        unit = k // CODES * UNIT + u * UNIT
        word = words_of(packed, start[None, :] + unit[:, None], row_bytes - unit[:, None], n[None, :] < N, UNIT)
        if GROUP == 0:
            g = tl.zeros((1,), tl.int32)
        elif GROUP >= BK:  # one group for the tile
            g = tl.zeros((1,), tl.int32) + k // GROUP
        else:
            g = (k + u * CODES) // GROUP
        there = (n[None, :] < N) & (g[:, None] < groups)
        at = n[None, :] * groups + g[:, None]
        scales = scale_of(scale, coarse, offset, scale_table, at, there, SCALING, FACTOR)
        for p in tl.static_range(CODES):
            column = k + u * CODES + p
            known = (m[:, None] < M) & (column[None, :] < K)
            if ORDER:
                column = tl.load(order + column, mask=column < K, other=0)
            xs = tl.load(x + m[:, None] * K + column[None, :], mask=known, other=0.0)
            values = number_of(word, p, table, BITS, CODES, HIGH, TABLE, SIGNED, MIDDLE)
            if ZERO:
                values -= tl.load(zero + at, mask=there, other=0).to(tl.float32)
            total = tl.dot(xs, (values * scales).to(x.dtype.element_ty), total, input_precision="ieee")
    mask = (m[:, None] < M) & (n[None, :] < N)
    at = m[:, None] * N + n[None, :]
    total = finish(total, at, n[None, :], mask, bias, residual, BIAS, ACTIVATION, RESIDUAL)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def decode(
    rows, order, packed, scale, coarse, offset, scale_table, zero, numbers, w, K, row_bytes, groups,
    BITS: tl.constexpr, UNIT: tl.constexpr, CODES: tl.constexpr, HIGH: tl.constexpr, TABLE: tl.constexpr,
    SIGNED: tl.constexpr, MIDDLE: tl.constexpr, GROUP: tl.constexpr, SCALING: tl.constexpr, FACTOR: tl.constexpr,
    ZERO: tl.constexpr, ORDER: tl.constexpr, ALIGNED: tl.constexpr, CHOSEN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """w[R, K]: every row of the weight, or (CHOSEN) those numbered in rows[R]; a program has BK columns of one."""
    row = tl.program_id(0).to(tl.int64)
    number = row
    if CHOSEN:
        number = tl.load(rows + row)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = k < K
    if ALIGNED:  # rows begin on bytes, and with a group
        within = k % CODES
        left = row_bytes - k // CODES * UNIT
        first = number * row_bytes + k // CODES * UNIT
        at = number * groups + (tl.zeros_like(k) if GROUP == 0 else k // GROUP)
    else:  # groups and bytes run through the flattened weight
        flat = number * K + k
        within = (flat % CODES).to(tl.int32)
        left = K - k
        first = flat // CODES * UNIT
        at = flat // GROUP
    word = words_of(packed, first, left, inside, UNIT)
    place = (CODES - 1 - within) * BITS if HIGH else within * BITS
    code = (word >> place) & ((1 << BITS) - 1)
    if TABLE:
        value = tl.gather(tl.load(numbers + tl.arange(0, 16)), code, 0)
    else:
        if SIGNED:
            code = (code ^ 128) - 128
        value = (code - MIDDLE).to(tl.float32)
    if ZERO:
        value -= tl.load(zero + at, mask=inside, other=0).to(tl.float32)
    value = value * scale_of(scale, coarse, offset, scale_table, at, inside, SCALING, FACTOR)
    if ORDER:
        k = tl.load(order + k, mask=inside, other=0)
    tl.store(w + row * K + k, value.to(w.dtype.element_ty), mask=inside)
