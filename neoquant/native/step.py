"""One new position of each row through a whole block, in C. All is float32 on the CPU; the caller sees to shapes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from neoquant.native.loader import active, threads
from neoquant.native.products import Weight

ACTIVATIONS = {"gelu_new": 0, "gelu_pytorch_tanh": 0, "relu": 1}  # by their number in weight.h

_LINEARS = 6
_Pointer = ctypes.c_void_p


class _Block(ctypes.Structure):
    """`struct nq_block`."""

    _fields_ = (
        ("weights", _Pointer * _LINEARS),
        ("biases", _Pointer * _LINEARS),
        ("norms", _Pointer * 4),
        ("heads", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("epsilons", ctypes.c_float * 2),
        ("activation", ctypes.c_int32),
        ("int8", ctypes.c_int32),
    )


class Packed(NamedTuple):
    """A linear layer: its weight, its bias [O], and whether x is rounded to int8 before it."""

    weight: Weight
    bias: Tensor | None
    int8: bool


def step(
    x: Tensor,
    layers: Sequence[Packed],
    norms: Sequence[Tensor],
    epsilons: tuple[float, float],
    *,
    heads: int,
    window: int | None,
    activation: int,
    keys: Tensor,
    values: Tensor,
    held: int,
    keep: Tensor | None,
) -> Tensor:
    """x[B, 1, C], the input of a block, to its output [B, 1, C]; key and value of the position are added at `held`.

    `layers` are q, k, v, out, fc and proj; `norms` are weight and bias [C] of the norm before attention and of the one
    before the MLP. `keys` and `values` [B, H, capacity, D] are contiguous; `keep` bool[B, held + 1] is False on
    padding, and its rows are contiguous.
    """
    block = _block(
        tuple([layer.weight.address for layer in layers]),
        tuple([None if layer.bias is None else layer.bias.data_ptr() for layer in layers]),
        tuple([norm.data_ptr() for norm in norms]),
        heads, window or 0, epsilons, activation, sum([layer.int8 << i for i, layer in enumerate(layers)]),
    )  # fmt: skip
    x = x.contiguous()
    y = torch.empty_like(x)
    active().call(
        "nq_step", ctypes.addressof(block), x.data_ptr(), x.shape[0], keys.data_ptr(), values.data_ptr(), keys.shape[2],
        held, None if keep is None else keep.data_ptr(), 0 if keep is None else keep.stride(0), y.data_ptr(),
        active().isa, threads(),
    )  # fmt: skip
    return y


@lru_cache(maxsize=1 << 10)
def _block(
    weights: tuple[int, ...],
    biases: tuple[int | None, ...],
    norms: tuple[int, ...],
    heads: int, window: int, epsilons: tuple[float, float], activation: int, int8: int,
) -> _Block:  # fmt: skip
    """Nothing but its arguments, as products' `_struct` is."""
    return _Block(
        (_Pointer * _LINEARS)(*weights), (_Pointer * _LINEARS)(*biases), (_Pointer * 4)(*norms), heads, window,
        (ctypes.c_float * 2)(*epsilons), activation, int8,
    )  # fmt: skip
