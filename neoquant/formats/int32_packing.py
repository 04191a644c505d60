"""Integers in 32-bit words, scales and the groups of inputs: what GPTQ and compressed-tensors share."""

from __future__ import annotations

import torch
from torch import Tensor

from neoquant import packing
from neoquant.errors import FormatError


def word_count(n: int, width: int) -> int:
    """Words that `n` codes of `width` bits take in one row."""
    return -(n * width // -32)


def to_words(codes: Tensor, width: int) -> Tensor:
    """uint8[R, N] packed along N into int32[R, ceil(N * width / 32)], the first code in the lowest bits.

    Codes follow each other without holes; the last word of a row is filled with zero bits.
    """
    packed = packing.pack(codes, width)
    if spare := -packed.shape[1] % 4:
        packed = torch.nn.functional.pad(packed, (0, spare))
    return packed.flatten().view(torch.int32).view(codes.shape[0], -1)


def to_bytes(words: Tensor) -> Tensor:
    """The bytes of int32[R, W]: uint8[R, 4 * W]."""
    return words.contiguous().flatten().view(torch.uint8).view(words.shape[0], -1)


def half_scales(name: str, scales: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Scales as float16, if nothing is lost by it. Raises FormatError naming `name` where something is."""
    if not scales.is_floating_point() or tuple(scales.shape) != shape:
        raise FormatError(f"{name} is float16 {list(shape)}, got {scales.dtype} {list(scales.shape)}")
    half = scales.to(torch.float16)
    if not torch.equal(half.to(scales.dtype), scales) or scales.dtype == torch.float64:
        raise FormatError(f"{name} is {scales.dtype} and does not fit float16")
    return half


def order_of(name: str, g_idx: Tensor, width: int) -> Tensor | None:
    """The activation order that `g_idx`[I], the group of each input, says: inputs group by group, each group's in
    rising order; None if that is 0, 1, 2, ... Raises FormatError naming `name` unless groups have `width` inputs."""
    natural = torch.arange(len(g_idx), dtype=torch.int32) // width
    if torch.equal(g_idx, natural):
        return None
    order = g_idx.argsort(stable=True)
    if not torch.equal(g_idx[order], natural):
        raise FormatError(f"{name} must put {width} inputs into each group, and the rest into the last")
    return order.to(torch.int32)
