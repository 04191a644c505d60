"""Products with packed weights, and decoding them, in C. Everything is on the CPU; the caller sees to shapes."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache, lru_cache

import torch
from torch import Tensor

from neoquant.native.loader import active, threads
from neoquant.native.rounding import DTYPES

_WHOLE_ROW = 62  # weight.h: so long that every row is one group
_POINTERS = (
    "codes", "table", "levels", "absmax", "stored", "nested", "nested_table", "offset", "scb", "scales", "zeros",
)  # fmt: skip


class _Struct(ctypes.Structure):
    """`struct nq_weight`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "groups")),
        *((name, ctypes.c_int32) for name in ("kind", "bits", "group_bits")),
        ("level_step", ctypes.c_float),
        ("plain", ctypes.c_int32),
        ("half_zeros", ctypes.c_int32),
        ("multiplier", ctypes.c_int32),
    )


class Weight:
    """A packed weight [O, I] as the library sees it; it holds the tensors whose addresses it knows."""

    def __init__(
        self,
        shape: tuple[int, ...],
        kind: int,
        bits: int,
        group: int | None,
        tensors: Mapping[str, Tensor | None],
        groups: int = 0,
        level_step: float = 1.0,
        plain: int = 0,
        half_zeros: bool = False,
        multiplier: int = 0,
    ) -> None:
        """`tensors` by the names of the struct's pointers; `group` columns share a scale, None for a whole row."""
        self.rows, self.columns = shape
        self.tensors = tensors
        group_bits = _WHOLE_ROW if group is None else group.bit_length() - 1
        addresses = tuple([(name, _address(tensor)) for name, tensor in tensors.items() if tensor is not None])
        numbers = (self.rows, self.columns, groups, kind, bits, group_bits, level_step, plain, half_zeros, multiplier)
        self.struct = _struct(addresses, *numbers)
        self.address = ctypes.addressof(self.struct)


def _address(tensor: Tensor) -> int:
    """Where a tensor lies. Raises RuntimeError for one of another device, which the library must not read."""
    if not tensor.is_cpu:
        raise RuntimeError(
            f"a product on the CPU was given a tensor on {tensor.device}: weights and activations must be on one device"
        )
    return tensor.data_ptr()


@lru_cache(maxsize=1 << 12)
def _struct(
    addresses: tuple[tuple[str, int], ...],
    rows: int, columns: int, groups: int, kind: int, bits: int, group_bits: int, level_step: float, plain: int,
    half_zeros: bool, multiplier: int,
) -> _Struct:  # fmt: skip
    """Nothing but its arguments, so that it may be kept: making it takes longer than a small product."""
    return _Struct(
        **dict(addresses), rows=rows, columns=columns, groups=groups, kind=kind, bits=bits, group_bits=group_bits,
        level_step=level_step, plain=plain, half_zeros=half_zeros, multiplier=multiplier,
    )  # fmt: skip


def codebook(
    packed: Tensor, table: Tensor, absmax: Tensor, nested: tuple[Tensor, Tensor, Tensor] | None, block_size: int,
    shape: tuple[int, ...], levels: Tensor, level_step: float,
) -> Weight:  # fmt: skip
    """Codes two a byte, high half first, over the flattened weight; `table` float32[16].

    `absmax` float32[blocks]; or, with `nested` = (absmax float32[ceil(blocks / 256)], table float32[256], offset
    float32[]), uint8[blocks]. `block_size` is a power of two. `levels` int8[16] times `level_step` is about `table`.
    """
    scales: dict[str, Tensor] = {"absmax": absmax}
    if nested is not None:
        scales = {"stored": absmax, "nested": nested[0], "nested_table": nested[1], "offset": nested[2]}
    tables = {"table": table, "levels": levels}
    return Weight(shape, 0, 4, block_size, {"codes": packed, **tables, **scales}, level_step=level_step)


def int8_rows(codes: Tensor, scb: Tensor, shape: tuple[int, ...]) -> Weight:
    """Codes int8[O, I] times scb float32[O] / 127."""
    return Weight(shape, 1, 8, None, {"codes": codes, "scb": scb, "table": _numbers(8), "levels": _levels(8)})


def affine(
    packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int | None, shape: tuple[int, ...]
) -> Weight:
    """Codes of `bits` bits as `neoquant.packing.pack` packs them, uint8[O, ceil(I * bits / 8)].

    `scale` float16[O, G] and `zero` uint8 or float16[O, G], or None where every zero is 2**(bits - 1); groups of
    `group` columns, a power of two from 16 on, or None for whole rows.
    """
    tables = {"table": _numbers(bits), "levels": _levels(bits)}
    tensors = {"codes": packed, "scales": scale, "zeros": zero, **tables}
    half_zeros = zero is not None and zero.dtype == torch.float16
    return Weight(shape, 2, bits, group, tensors, groups=scale.shape[1], half_zeros=half_zeros)


def trellis(
    words: Tensor, scale: Tensor, table: Tensor, bits: int, multiplier: int, group: int | None, shape: tuple[int, ...]
) -> Weight:
    """Paths of 2 or 3 bits down the rows, int16[bits * ceil(O / 16) + 2, I] as weight.h has them; `table` float32[16],
    of 3 bits without the negatives.

    `scale` float16[O, G]; groups of `group` columns, a power of two from 16 on, or None for whole rows.
    """
    tensors = {"codes": words, "scales": scale, "table": table}
    return Weight(shape, 4, bits, group, tensors, groups=scale.shape[1], multiplier=multiplier)


def plain(weight: Tensor) -> Weight:
    """A weight that is not quantized, float32, float16 or bfloat16 [O, I], contiguous."""
    bits = 8 * weight.itemsize
    return Weight(tuple(weight.shape), 3, bits, None, {"codes": weight}, plain=DTYPES[weight.dtype])


def multiply(x: Tensor, w: Weight, bias: Tensor | None, int8: bool = False) -> Tensor:
    """x float32[M, I] times the weight's transpose, plus bias float32[O]: float32[M, O].

    With `int8`, x is rounded to int8 in runs of inputs first, each with its own scale.
    """
    x = x.contiguous()
    y = torch.empty(x.shape[0], w.rows, dtype=torch.float32)
    active().call(
        "nq_multiply_int8" if int8 else "nq_multiply", w.address, _address(x), x.shape[0],
        None if bias is None else _address(bias), y.data_ptr(), active().isa, threads(),
    )  # fmt: skip
    return y


def decode(w: Weight, first: int, out: Tensor) -> None:
    """Rows [first, first + n) of the weight into out, float32[n, I], contiguous."""
    active().call("nq_decode", w.address, None, first, out.shape[0], out.data_ptr(), threads())


def decode_rows(w: Weight, rows: Tensor) -> Tensor:
    """Rows of the weight, by their numbers [N], whole ones of any type: float32[N, I]."""
    rows = rows.long().contiguous()
    out = torch.empty(len(rows), w.columns, dtype=torch.float32)
    active().call("nq_decode", w.address, _address(rows), 0, len(rows), out.data_ptr(), threads())
    return out


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits float32[B, V], contiguous: the first place of each row's largest, int64[B], and whether that is finite
    and nothing in the row is NaN, bool[B]."""
    rows, columns = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64)
    finite = torch.empty(rows, dtype=torch.bool)
    active().call(
        "nq_likeliest", _address(logits), rows, columns, tokens.data_ptr(), finite.data_ptr(), threads()
    )  # fmt: skip
    return tokens, finite


@cache
def _numbers(bits: int) -> Tensor:
    """Codes less their middle, over and over, float32[16]; codes of 8 bits are not looked up."""
    return (torch.arange(16) % (1 << bits) - (1 << bits >> 1)).float()


@cache
def _levels(bits: int) -> Tensor:
    """The same as int8[16]."""
    return _numbers(bits).to(torch.int8)
