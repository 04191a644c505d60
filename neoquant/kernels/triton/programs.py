"""The programs that Triton compiles: products with packed weights, rows of them, whole weights decoded, and attention
of one new position to those before it.

A weight [N, K] is described by constants, which `arrangement` reads off a grid's `Decoding`:

    BITS      of a code; UNIT bytes hold CODES codes, the first in the lowest bits, or (HIGH) in the highest
    TABLE     codes are looked up in 16 numbers, which a program holds in registers; else they are integers, two's
              complement (SIGNED), less MIDDLE
    GROUP     inputs that share a scale; 0: all of a row
    SCALING   0: a stored scale; 1: a byte looked up; 2: that, times a scale of 256 scales, plus an offset
    FACTOR    of the scale
    ZERO      whether each group has a zero, a byte or float16

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
def one_of_three(first, second, third):
    """That of the third axis of a launch."""
    which = tl.program_id(2)
    found = first
    if which == 1:
        found = second
    if which == 2:
        found = third
    return found


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
    order_1, packed_1, scale_1, coarse_1, offset_1, zero_1, order_2, packed_2, scale_2, coarse_2, offset_2, zero_2,
    BITS: tl.constexpr, UNIT: tl.constexpr, CODES: tl.constexpr, HIGH: tl.constexpr, TABLE: tl.constexpr,
    SIGNED: tl.constexpr, MIDDLE: tl.constexpr, GROUP: tl.constexpr, SCALING: tl.constexpr, FACTOR: tl.constexpr,
    ZERO: tl.constexpr, ORDER: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
    THREE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y[M, N] = x[M, K] W[N, K]^T for M up to BM: a program has BN rows of W and reads each byte of them once.

    THREE: y[3, M, N], of three weights alike, as those of query, key and value are.
    """
    if THREE:
        order, packed = one_of_three(order, order_1, order_2), one_of_three(packed, packed_1, packed_2)
        scale, coarse = one_of_three(scale, scale_1, scale_2), one_of_three(coarse, coarse_1, coarse_2)
        offset, zero = one_of_three(offset, offset_1, offset_2), one_of_three(zero, zero_1, zero_2)
        y += tl.program_id(2) * M * N
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
    order_1, packed_1, scale_1, coarse_1, offset_1, zero_1, order_2, packed_2, scale_2, coarse_2, offset_2, zero_2,
    BITS: tl.constexpr, UNIT: tl.constexpr, CODES: tl.constexpr, HIGH: tl.constexpr, TABLE: tl.constexpr,
    SIGNED: tl.constexpr, MIDDLE: tl.constexpr, GROUP: tl.constexpr, SCALING: tl.constexpr, FACTOR: tl.constexpr,
    ZERO: tl.constexpr, ORDER: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
    THREE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The same with the tensor cores, for M of 5 to some 64: W is decoded tile by tile into x's type."""
    if THREE:
        order, packed = one_of_three(order, order_1, order_2), one_of_three(packed, packed_1, packed_2)
        scale, coarse = one_of_three(scale, scale_1, scale_2), one_of_three(coarse, coarse_1, coarse_2)
        offset, zero = one_of_three(offset, offset_1, offset_2), one_of_three(zero, zero_1, zero_2)
        y += tl.program_id(2) * M * N
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


@triton.jit
def attend(
    qkv, keys, values, position, keep, y, parts, B, H, D, S, WIDTH: tl.constexpr, KEEP: tl.constexpr,
    SPLITS: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Attention of the position that comes next, of one head and (SPLITS) one stretch of what it sees a program.

    qkv[3, B, H, D]; keys and values[B, H, S, D] are rings, in which position p lies at p modulo S; `position`[1] comes
    next: its key and value are written there, whatever lies there. keep[B, WIDTH] is 0 on hidden positions. Scores are
    not scaled. y[B, H, D], or, of SPLITS stretches, parts[B, H, SPLITS, 2 + D]: the greatest score, the sum of
    exp(score - greatest), and the values weighted by that.
    """
    row = tl.program_id(0)  # of B * H
    split = tl.program_id(1)
    b = row // H
    d = tl.arange(0, BD)
    inside = d < D
    query = tl.load(qkv + row * D + d, mask=inside, other=0.0).to(tl.float32)
    at = tl.load(position).to(tl.int32)
    place = at % S
    base = row.to(tl.int64) * S * D
    greatest = float("-inf")
    total = 0.0
    weighted = tl.zeros((BD,), tl.float32)
    if split == 0:  # the new position, which sees itself
        key = tl.load(qkv + (B * H + row) * D + d, mask=inside, other=0.0)
        value = tl.load(qkv + (2 * B * H + row) * D + d, mask=inside, other=0.0)
        tl.store(keys + base + place * D + d, key, mask=inside)
        tl.store(values + base + place * D + d, value, mask=inside)
        greatest = tl.sum(query * key.to(tl.float32), axis=0)
        total = 1.0
        weighted = value.to(tl.float32)
    count = tl.minimum(at + 1, S)  # places that hold something, or will
    stretch = tl.cdiv(tl.cdiv(count, BS), SPLITS) * BS
    for start in range(split * stretch, tl.minimum((split + 1) * stretch, count), BS):
        s = start + tl.arange(0, BS)
        back = place - s
        back = tl.where(back < 0, back + S, back)
        seen = (s < count) & (s != place)
        if KEEP:
            seen &= tl.load(keep + b * WIDTH + (at - back), mask=seen, other=0) != 0
        where = base + s[:, None] * D + d[None, :]
        there = seen[:, None] & inside[None, :]
        key = tl.load(keys + where, mask=there, other=0.0).to(tl.float32)
        scores = tl.where(seen, tl.sum(key * query[None, :], axis=1), float("-inf"))
        higher = tl.maximum(greatest, tl.max(scores, axis=0))
        if higher > float("-inf"):
            shrink = tl.exp(greatest - higher)
            weights = tl.exp(scores - higher)
            value = tl.load(values + where, mask=there, other=0.0).to(tl.float32)
            weighted = weighted * shrink + tl.sum(value * weights[:, None], axis=0)
            total = total * shrink + tl.sum(weights, axis=0)
            greatest = higher
    if SPLITS == 1:
        tl.store(y + row * D + d, (weighted / total).to(y.dtype.element_ty), mask=inside)
    else:
        to = parts + (row * SPLITS + split) * (2 + D)
        tl.store(to, greatest)
        tl.store(to + 1, total)
        tl.store(to + 2 + d, weighted, mask=inside)


@triton.jit
def join_parts(parts, y, D, SPLITS: tl.constexpr, BD: tl.constexpr):
    """y[R, D] of parts[R, SPLITS, 2 + D], as `attend` leaves them; the first stretch of each row saw something."""
    row = tl.program_id(0)
    d = tl.arange(0, BD)
    at = parts + (row * SPLITS + tl.arange(0, SPLITS)) * (2 + D)
    greatest = tl.load(at)
    share = tl.exp(greatest - tl.max(greatest, axis=0))
    total = tl.sum(share * tl.load(at + 1), axis=0)
    found = tl.load(at[:, None] + 2 + d[None, :], mask=d[None, :] < D, other=0.0)
    tl.store(y + row * D + d, (tl.sum(found * share[:, None], axis=0) / total).to(y.dtype.element_ty), mask=d < D)
