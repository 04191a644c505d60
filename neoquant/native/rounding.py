"""Rounding weights in C, with the bytes of bitsandbytes and of the grids.

`refuse` says why something else must do it; what it does not refuse, the functions here do.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from neoquant.native.loader import active, threads

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # by their number in cpu.h
KNOWN_BITSANDBYTES = "0.50."  # the releases whose double quantization `round_nested` does
_STEPS = 65536


def refuse(w: Tensor) -> str | None:
    """Why the native library cannot round this weight, or None."""
    if w.dtype not in DTYPES:
        return f"the tensor is {w.dtype}; native are float32, float16 and bfloat16"
    return "the tensor is empty" if w.numel() == 0 else refuse_bytes(w)


def refuse_bytes(tensor: Tensor) -> str | None:
    """Why the native library cannot pack or unpack this tensor, or None."""
    if tensor.device.type != "cpu":
        return f"the tensor is on {tensor.device.type}"
    return None if active().library is not None else active().reason


def refuse_nested(absmax: Tensor) -> str | None:
    """Why the native library cannot quantize absmax as the installed bitsandbytes does, or None."""
    return refuse(absmax) or _refuse_bitsandbytes()


def round_blocks(w: Tensor, block_size: int, bounds: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """NF4 and FP4: the flat weight w[n] to codes uint8[n] and absmax float32[blocks].

    `bounds` float32[15] are the midpoints between the sorted values, `order` uint8[16] the code of each interval. A
    block that holds infinity or NaN has an absmax that is not finite, and codes without meaning.
    """
    w = w.contiguous()
    codes = torch.empty(w.numel(), dtype=torch.uint8)
    absmax = torch.empty(-(w.numel() // -block_size), dtype=torch.float32)
    bounds = torch.cat([bounds, bounds.new_tensor([torch.inf])])
    active().call(
        "nq_round_blocks", w.data_ptr(), DTYPES[w.dtype], w.numel(), block_size, bounds.data_ptr(), order.data_ptr(),
        codes.data_ptr(), absmax.data_ptr(), active().isa, threads(),
    )  # fmt: skip
    return codes, absmax


def round_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """int8: w[O, I] to codes int8[O, I] and absmax float32[O], through half precision.

    A row that holds infinity or NaN, or what half precision cannot hold, has an absmax that is not finite.
    """
    w = w.contiguous()
    codes = torch.empty(w.shape, dtype=torch.int8)
    absmax = torch.empty(w.shape[0], dtype=torch.float32)
    active().call(
        "nq_round_rows", w.data_ptr(), DTYPES[w.dtype], w.shape[0], w.shape[1],
        codes.data_ptr(), absmax.data_ptr(), active().isa, threads(),
    )  # fmt: skip
    return codes, absmax


def fit_affine(w: Tensor, width: int, bits: int, scale: Tensor, zero: Tensor | None, codes: Tensor | None) -> bool:
    """Affine: w[O, I] to scale float16[O, G] and zero[O, G], uint8 or float16 (None: symmetric); and codes uint8[O, I],
    if wanted.

    Groups are `width` columns. Returns whether all scales are finite; where they are not, nothing that was written
    has a meaning.
    """
    return _affine(w, width, bits, 1, scale, zero, codes)


def round_affine(w: Tensor, width: int, bits: int, scale: Tensor, zero: Tensor | None) -> Tensor:
    """w[O, I] to codes uint8[O, I] under parameters as `fit_affine` gives them, contiguous."""
    codes = torch.empty(w.shape, dtype=torch.uint8)
    _affine(w, width, bits, 0, scale, zero, codes)
    return codes


def _affine(
    w: Tensor, width: int, bits: int, fit: int, scale: Tensor, zero: Tensor | None, codes: Tensor | None
) -> bool:
    w = w.contiguous()
    half_zeros = zero is not None and zero.dtype == torch.float16
    overflows = active().call(
        "nq_affine", w.data_ptr(), DTYPES[w.dtype], w.shape[0], w.shape[1], width, bits, fit, scale.data_ptr(),
        None if zero is None else zero.data_ptr(), half_zeros, None if codes is None else codes.data_ptr(),
        active().isa, threads(),
    )  # fmt: skip
    return not overflows


def round_nested(values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Double quantization: values float32[n] to codes uint8[n] and absmax float32[ceil(n / 256)].

    `table` float32[256] are the sorted values of the codes.
    """
    values = values.contiguous()
    codes = torch.empty(values.numel(), dtype=torch.uint8)
    absmax = torch.empty(-(values.numel() // -256), dtype=torch.float32)
    steps = _code_of_step(table)
    active().call(
        "nq_round_nested", values.data_ptr(), values.numel(), steps.data_ptr(),
        codes.data_ptr(), absmax.data_ptr(), active().isa,
    )  # fmt: skip
    return codes, absmax


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8[2 n] below 16 into uint8[n], the first of two in the high half."""
    codes = codes.contiguous()
    words = torch.empty(codes.numel() // 2, dtype=torch.uint8)
    active().call("nq_pack_nibbles", codes.data_ptr(), words.data_ptr(), words.numel(), threads())
    return words


def unpack_nibbles(words: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    words = words.contiguous()
    codes = torch.empty(words.numel() * 2, dtype=torch.uint8)
    active().call("nq_unpack_nibbles", words.data_ptr(), codes.data_ptr(), words.numel(), threads())
    return codes


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8[..., n] below 2**bits into uint8[..., ceil(n * bits / 8)], low bits first, every row on a byte."""
    codes = codes.contiguous()
    n = codes.shape[-1]
    words = torch.empty(*codes.shape[:-1], (n * bits + 7) // 8, dtype=torch.uint8)
    active().call("nq_pack", codes.data_ptr(), words.data_ptr(), codes.numel() // n, n, bits, threads())
    return words


def unpack(words: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack`."""
    words = words.contiguous()
    codes = torch.empty(*words.shape[:-1], n, dtype=torch.uint8)
    active().call("nq_unpack", words.data_ptr(), codes.data_ptr(), codes.numel() // n, n, bits, threads())
    return codes


@cache
def _code_of_step(table: Tensor) -> Tensor:
    """The code nearest to each of 65536 even steps from -1 to 1, uint8[65536]; `table` is a cached tensor."""
    steps = -1.0 + (2.0 * torch.arange(_STEPS, dtype=torch.float32)) / (_STEPS - 1)
    return torch.bucketize(steps, 0.5 * (table[:-1] + table[1:]), out_int32=True).to(torch.uint8)


@cache
def _refuse_bitsandbytes() -> str | None:
    try:
        installed = version("bitsandbytes")
    except PackageNotFoundError:
        return None
    if installed.startswith(KNOWN_BITSANDBYTES):
        return None
    return f"bitsandbytes {installed} may round absmax otherwise than {KNOWN_BITSANDBYTES}x: it is asked itself"
