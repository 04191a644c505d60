"""Small integers packed into bytes, without holes.

`pack` and `unpack` put the first code into the lowest bits (little end first) and start every row on a byte:

    4 bits     byte 0                3 bits     byte 0            byte 1            byte 2
               b b b b a a a a                  c c b b b a a a   f e e e d d d c   h h h g g g f f
               ───────────────                  ───────────────   ───────────────   ───────────────
               7             0                  7             0   7             0   7             0

Eight codes of n bits fill exactly n bytes, so both directions work on groups of eight. A row whose end does not
fill its last byte is padded with zero bits.

`pack_nibbles` and `unpack_nibbles` are bitsandbytes' order: one row, two codes a byte, the first in the *high* half:

               byte 0
               a a a a b b b b
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from neoquant.native import rounding


def row_bytes(n: int, bits: int) -> int:
    """Bytes that `n` codes of `bits` bits take in one row."""
    return (n * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack `codes`, uint8[..., n] below 2**bits, into uint8[..., ceil(n * bits / 8)]."""
    _check(codes, bits)
    if bits == 8:
        return codes.contiguous()
    if codes.numel() and rounding.refuse_bytes(codes) is None:
        return rounding.pack(codes, bits)
    n = codes.shape[-1]
    groups = (n + 7) // 8
    if n % 8:
        codes = torch.nn.functional.pad(codes, (0, groups * 8 - n))
    eights = codes.reshape(*codes.shape[:-1], groups, 8)
    words = eights.new_zeros(*eights.shape[:-1], bits)
    for k in range(8):
        byte, shift = divmod(k * bits, 8)
        words[..., byte] |= eights[..., k] << shift
        if shift + bits > 8:  # the code's upper bits spill into the next byte
            words[..., byte + 1] |= eights[..., k] >> (8 - shift)
    return words.reshape(*codes.shape[:-1], groups * bits)[..., : row_bytes(n, bits)].contiguous()


def unpack(words: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack`: uint8[..., ceil(n * bits / 8)] into the first `n` codes, uint8[..., n]."""
    _check(words, bits)
    if words.shape[-1] != row_bytes(n, bits):
        raise ValueError(f"{n} codes of {bits} bits take {row_bytes(n, bits)} bytes, got {words.shape[-1]}")
    if bits == 8:
        return words.contiguous()
    if words.numel() and rounding.refuse_bytes(words) is None:
        return rounding.unpack(words, bits, n)
    groups = (n + 7) // 8
    if words.shape[-1] != groups * bits:
        words = torch.nn.functional.pad(words, (0, groups * bits - words.shape[-1]))
    low, high, shift, back = _places(bits, words.device)
    grouped = words.reshape(-1, bits)
    eights = grouped.index_select(1, low) >> shift
    if 8 % bits:  # some codes begin in one byte and end in the next
        eights |= grouped.index_select(1, high) << back
    return (eights & ((1 << bits) - 1)).view(*words.shape[:-1], groups * 8)[..., :n].contiguous()


@cache
def _places(bits: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of eight codes in `bits` bytes: the bytes that they begin and end in, int64[8], and by how much they are shifted
    down from the one and up from the other, uint8[8]. For a code within one byte, the other gives bits above its own.
    """
    first = torch.arange(8) * bits
    begins, shifts = first // 8, first % 8
    ends = (first + bits - 1) // 8
    back = torch.where(ends > begins, 8 - shifts, bits)
    return tuple(part.to(device) for part in (begins, ends, shifts.byte(), back.byte()))  # type: ignore[return-value]


def pack_nibbles(codes: Tensor, pad: int = 0) -> Tensor:
    """Pack 4-bit `codes`, uint8[n], into uint8[ceil(n / 2)], the first of two in the high half.

    An odd `n` leaves half a byte, which holds `pad`.
    """
    _check(codes, 4)
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=pad)
    if rounding.refuse_bytes(codes) is None:
        return rounding.pack_nibbles(codes)
    return (codes[::2] << 4).bitwise_or_(codes[1::2])


def unpack_nibbles(words: Tensor, n: int, out: Tensor | None = None) -> Tensor:
    """The inverse of `pack_nibbles`: uint8[ceil(n / 2)] into uint8[n], into `out` where given."""
    _check(words, 4)
    if words.numel() != row_bytes(n, 4):
        raise ValueError(f"{n} codes of 4 bits take {row_bytes(n, 4)} bytes, got {words.numel()}")
    if out is None and rounding.refuse_bytes(words) is None:
        return rounding.unpack_nibbles(words)[:n]
    codes = words.new_empty(n) if out is None else out
    codes[::2] = words >> 4
    codes[1::2] = (words & 0xF)[: n // 2]
    return codes


def take_nibbles(words: Tensor, rows: Tensor, n: int) -> Tensor:
    """Of `words` as `pack_nibbles` gives them for rows of `n` codes, those of `rows`, int64[N]: uint8[N, n]."""
    places = rows[:, None] * n + torch.arange(n, device=words.device)
    found = words[places >> 1]
    return torch.where(places % 2 == 0, found >> 4, found & 0xF)


def _check(tensor: Tensor, bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    if tensor.dtype != torch.uint8:
        raise ValueError(f"codes and their bytes are uint8, got {tensor.dtype}")
