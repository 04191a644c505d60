"""Products with packed weights, and decoding them, in C. Everything is on the CPU; the caller sees to shapes.

A weight is given as the arguments that its C functions share: `codebook` and `int8_rows` make them, from tensors that
must live as long as they are used.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from neoquant.native.loader import active, threads


class Weight(NamedTuple):
    """A packed weight [O, I]: the kind of its C functions, their leading arguments, and its shape."""

    kind: str
    arguments: tuple[int | None, ...]
    rows: int
    columns: int


def codebook(
    packed: Tensor, table: Tensor, absmax: Tensor, nested: tuple[Tensor, Tensor, Tensor] | None, block_size: int,
    shape: tuple[int, ...],
) -> Weight:  # fmt: skip
    """Codes two a byte, high half first, over the flattened weight; `table` float32[16].

    `absmax` float32[blocks]; or, with `nested` = (absmax float32[ceil(blocks / 256)], table float32[256], offset
    float32[]), uint8[blocks]. `block_size` is a power of two.
    """
    plain, stored, rest = (
        (absmax.data_ptr(), None, (None, None, None))
        if nested is None
        else (None, absmax.data_ptr(), tuple(tensor.data_ptr() for tensor in nested))
    )
    arguments = (packed.data_ptr(), table.data_ptr(), plain, stored, *rest, block_size.bit_length() - 1)
    return Weight("codebook", arguments, shape[0], shape[1])


def int8_rows(codes: Tensor, scb: Tensor, shape: tuple[int, ...]) -> Weight:
    """Codes int8[O, I] times scb float32[O] / 127."""
    return Weight("int8", (codes.data_ptr(), scb.data_ptr()), shape[0], shape[1])


def multiply(x: Tensor, w: Weight, bias: Tensor | None) -> Tensor:
    """x float32[M, I] times the weight's transpose, plus bias float32[O]: float32[M, O]. Made for few rows."""
    x = x.contiguous()
    y = torch.empty(x.shape[0], w.rows, dtype=torch.float32)
    active().call(
        f"nq_multiply_{w.kind}", *w.arguments, w.rows, w.columns, x.data_ptr(), x.shape[0],
        None if bias is None else bias.data_ptr(), y.data_ptr(), active().isa, threads(),
    )  # fmt: skip
    return y


def decode(w: Weight, first: int, out: Tensor) -> None:
    """Rows [first, first + n) of the weight into out, float32[n, I], contiguous."""
    isa = (active().isa,) if w.kind == "codebook" else ()
    active().call(f"nq_decode_{w.kind}", *w.arguments, w.columns, first, out.shape[0], out.data_ptr(), *isa, threads())
