"""How the native library sees a weight: by what its grid's `Decoding` states, worked out once for each grid and shape.

The library multiplies with four kinds of weights (native/weight.h):

    codebook    16 numbers by code, two codes a byte, high half first; a float32 scale, or a byte looked up, for each
                block of the flattened weight
    int8        signed bytes, a float32 scale / 127 for each row
    affine      integers of 2, 3, 4 or 8 bits, low bits first, rows on bytes; a float16 scale for each group of a row,
                and a zero, a byte or float16, or none beside the middle
    trellis     16 codes of a column are a word, of three bits one and a half, the first code in the highest bits; a
                float16 scale for each group of a row
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from neoquant import packing
from neoquant.errors import FormatError
from neoquant.grids import NESTED_GROUP, Decoding, Grid
from neoquant.grids.decoding import Trellis, tensor_of
from neoquant.kernels.base import State
from neoquant.native import products

SHORTEST_BLOCK, SHORTEST_GROUP = 32, 16
BLOCK, RING = 16, 256  # rows of a trellis whose codes lie together, and rows in a ring
_CPU = torch.device("cpu")


class _Arrangement(NamedTuple):
    """`codes`: the name that they have in the state. `nibbles`: two a byte over the flattened weight."""

    codes: str
    nibbles: bool
    weight: Callable[[State], products.Weight]


def refuse(grid: Grid, shape: tuple[int, ...], who: str = "the native library does") -> str | None:
    """Why a weight [O, I] on `grid` cannot be held so, or None; `who` cannot run it."""
    found = _arrange(grid, shape)
    return f"{who} not run {grid.name}: {found}" if isinstance(found, str) else None


def codes_name(grid: Grid, shape: tuple[int, ...]) -> str:
    """The name of the codes in the state."""
    return _require(grid, shape).codes


def pack_codes(codes: Tensor, grid: Grid) -> State:
    """The codes uint8[O, I] as the library reads them, under their name in the state."""
    arrangement = _require(grid, tuple(codes.shape))
    if arrangement.nibbles:
        return {arrangement.codes: packing.pack_nibbles(codes.reshape(-1), pad=grid.decoding.zero_code)}
    if grid.decoding.trellis is not None:
        return {arrangement.codes: _pack_words(codes, grid.decoding.trellis)}
    packed = packing.pack(codes, grid.bits)
    return {arrangement.codes: packed.view(torch.int8) if grid.decoding.signed else packed}


def unpack_codes(state: State, grid: Grid, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack_codes`: uint8[O, I]."""
    arrangement = _require(grid, shape)
    if grid.decoding.trellis is not None:
        return _unpack_words(state[arrangement.codes], shape[0], grid.decoding.trellis.code_bits)
    packed = state[arrangement.codes].view(torch.uint8)
    if arrangement.nibbles:
        return packing.unpack_nibbles(packed, shape[0] * shape[1]).view(shape)
    return packing.unpack(packed, grid.bits, shape[1])


def native_weight(state: State, grid: Grid, shape: tuple[int, ...]) -> products.Weight:
    """The weight of a state, without its activation order."""
    return _require(grid, shape).weight(state)


def _require(grid: Grid, shape: tuple[int, ...]) -> _Arrangement:
    found = _arrange(grid, shape)
    if isinstance(found, str):
        raise FormatError(f"the native library does not run {grid.name}: {found}")
    return found


@lru_cache(maxsize=1 << 12)
def _arrange(grid: Grid, shape: tuple[int, ...]) -> _Arrangement | str:
    """How the library runs a grid, or why it does not."""
    decoding = grid.decoding
    dtype, size = grid.param_shapes(shape)[decoding.scale.param]
    if decoding.trellis is not None:
        reason = _refuse_trellis(decoding, dtype, shape)
        made = None if reason else _Arrangement("words", False, _trellis(decoding, shape))
    elif decoding.table is not None:
        reason = _refuse_codebook(decoding, dtype, shape)
        made = None if reason else _Arrangement("packed", True, _codebook(decoding, shape, size))
    elif decoding.signed:
        reason = _refuse_int8(decoding, dtype)
        made = None if reason else _Arrangement("codes", False, _int8(decoding, shape))
    else:
        reason = _refuse_affine(decoding, dtype, shape)
        made = None if reason else _Arrangement("packed", False, _affine(decoding, shape))
    return made if made is not None else str(reason)


def _refuse_codebook(decoding: Decoding, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    width, scale = decoding.width(shape[1]), decoding.scale
    if decoding.bits != 4 or decoding.zero is not None:
        return "codebooks have 16 values and no zeros"
    if width & (width - 1) or width < SHORTEST_BLOCK:
        return f"blocks are powers of two from {SHORTEST_BLOCK} on, not {width}"
    if not decoding.flat and shape[1] % width:
        return f"blocks run through the flattened weight, and {width} does not divide rows of {shape[1]}"
    if scale.factor != 1 or dtype != (torch.float32 if scale.table is None else torch.uint8):
        return f"scales of blocks are float32, or bytes with a table, not {dtype}"
    return None


def _refuse_int8(decoding: Decoding, dtype: torch.dtype) -> str | None:
    scale = decoding.scale
    if decoding.bits != 8 or decoding.group is not None or decoding.zero is not None:
        return "signed integers have 8 bits, one scale a row and no zeros"
    if dtype != torch.float32 or scale.factor != 1 / 127 or scale.table is not None:
        return "scales of signed integers are float32, over 127"
    return None


def _refuse_affine(decoding: Decoding, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    width = decoding.width(shape[1])
    if decoding.flat or decoding.bits not in (2, 3, 4, 8):
        return "integers have 2, 3, 4 or 8 bits, in groups of a row"
    if width < shape[1] and (width & (width - 1) or width < SHORTEST_GROUP):
        return f"groups are powers of two from {SHORTEST_GROUP} on, not {width}"
    if dtype != torch.float16 or decoding.scale.factor != 1 or decoding.scale.table is not None:
        return f"scales of groups are float16, not {dtype}"
    if decoding.zero is None and decoding.middle != 1 << (decoding.bits - 1):
        return f"without zeros, the zero is the middle code, not {decoding.middle}"
    return None


def _refuse_trellis(decoding: Decoding, dtype: torch.dtype, shape: tuple[int, ...]) -> str | None:
    width, trellis = decoding.width(shape[1]), decoding.trellis
    assert trellis is not None
    bits, table = trellis.code_bits, decoding.table
    if bits not in (2, 3) or (trellis.state_bits, trellis.level_bits, trellis.span) != (12, bits + 2, RING):
        return f"trellises have codes of 2 or 3 bits, states of 12, 16 or 32 values and rings of {RING} rows"
    if bits == 3 and (table is None or table[16:] != tuple(-value for value in table[:16])):
        return "of the values of a trellis of 3 bits, the last sixteen are the negatives of the first"
    if width < shape[1] and (width & (width - 1) or width < SHORTEST_GROUP):
        return f"groups are powers of two from {SHORTEST_GROUP} on, not {width}"
    if decoding.flat or dtype != torch.float16 or decoding.scale.factor != 1 or decoding.scale.table is not None:
        return f"scales of groups of a row are float16, not {dtype}"
    return None


def _codebook(
    decoding: Decoding, shape: tuple[int, ...], scales: tuple[int, ...]
) -> Callable[[State], products.Weight]:
    assert decoding.table is not None
    table, (levels, step) = tensor_of(decoding.table, _CPU), decoding.levels()
    scale, width = decoding.scale, decoding.width(shape[1])
    if scale.table is None:
        return lambda state: products.codebook(
            state["packed"], table, state[scale.param], None, width, shape, levels, step
        )
    values = tensor_of(scale.table, _CPU)
    if scale.nested is not None:
        coarse, offset = scale.nested
        return lambda state: products.codebook(
            state["packed"], table, state[scale.param], (state[coarse], values, state[offset]), width, shape, levels,
            step,
        )  # fmt: skip
    # the library looks bytes up under double quantization alone: with scales of one and no offset it is the same
    blocks = torch.Size(scales).numel()
    nested = (torch.ones(-(blocks // -NESTED_GROUP)), values, torch.zeros(()))
    return lambda state: products.codebook(
        state["packed"], table, state[scale.param], nested, width, shape, levels, step
    )


def _int8(decoding: Decoding, shape: tuple[int, ...]) -> Callable[[State], products.Weight]:
    scale = decoding.scale.param
    return lambda state: products.int8_rows(state["codes"], state[scale], shape)


def _affine(decoding: Decoding, shape: tuple[int, ...]) -> Callable[[State], products.Weight]:
    scale, zero, bits, width = decoding.scale.param, decoding.zero, decoding.bits, decoding.width(shape[1])
    group = None if width == shape[1] else width
    return lambda state: products.affine(
        state["packed"], state[scale], None if zero is None else state[zero], bits, group, shape
    )


def _trellis(decoding: Decoding, shape: tuple[int, ...]) -> Callable[[State], products.Weight]:
    trellis, scale, width = decoding.trellis, decoding.scale.param, decoding.width(shape[1])
    assert trellis is not None and decoding.table is not None
    table, group = tensor_of(decoding.table[:16], _CPU), None if width == shape[1] else width
    return lambda state: products.trellis(
        state["words"], state[scale], table, trellis.code_bits, trellis.multiplier, group, shape
    )


def _pack_words(codes: Tensor, trellis: Trellis) -> Tensor:
    """Codes uint8[O, I] to half words, int16[bits * ceil(O / 16) + 2, I]: of each sixteen rows those of the words,
    column after column, and of three bits the rest of each column. Behind them, the last ring's last codes' words."""
    rows, bits = len(codes), trellis.code_bits
    first = (rows - 1) // trellis.span * trellis.span
    last = first + (torch.arange(-BLOCK, 0, device=codes.device)).remainder(rows - first)
    filled = torch.cat([torch.nn.functional.pad(codes, (0, 0, 0, -rows % BLOCK)), codes[last]])
    blocks = filled.view(-1, BLOCK, codes.shape[1])
    number = torch.zeros(len(blocks), codes.shape[1], dtype=torch.int64, device=codes.device)
    for row in range(BLOCK):
        number |= blocks[:, row].long() << bits * (BLOCK - 1 - row)
    words = number.to(torch.int32).view(torch.int16).view(len(blocks), 2, -1)  # the lowest bits
    halves = words if bits == 2 else torch.cat([words, (number >> 32).to(torch.int16)[:, None]], 1)
    return halves.view(-1, codes.shape[1])[: bits * (len(blocks) - 1) + 2].contiguous()


def _unpack_words(halves: Tensor, rows: int, bits: int) -> Tensor:
    """The inverse: uint8[O, I]."""
    columns = halves.shape[1]
    blocks = halves[:-2].view(-1, bits, columns)
    number = blocks[:, :2].reshape(-1, 2 * columns).contiguous().view(torch.int32).long() & 0xFFFFFFFF
    if bits == 3:
        number |= blocks[:, 2].long() << 32
    codes = torch.empty(len(blocks), BLOCK, columns, dtype=torch.uint8, device=halves.device)
    for row in range(BLOCK):
        codes[:, row] = (number >> bits * (BLOCK - 1 - row)) & ((1 << bits) - 1)
    return codes.view(-1, columns)[:rows].contiguous()
