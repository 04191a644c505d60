"""New positions of sequences through a whole block, in C. All is float32 on the CPU; the caller sees to shapes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from neoquant.native.loader import ISAS, active, threads
from neoquant.native.products import Weight

ACTIVATIONS = {"gelu_new": 0, "gelu_pytorch_tanh": 0, "relu": 1}  # by their number in weight.h

STORED = {torch.float32: 0, torch.float16: 1, torch.uint8: 2}
"""How keys and values may be held, by their number in weight.h; bytes have a scale for each head and position."""

_LINEARS = 6
_Pointer = ctypes.c_void_p


def outruns_torch() -> bool:
    """Whether many rows meet a weight that is not quantized faster here than in torch: measured with AVX-512 (twice as
    fast) and AVX2 (as fast)."""
    return ISAS[active().isa].startswith("avx512")


def rows_alike() -> int:
    """Up to how many rows together each get the bits that they get alone: FEW_MOST in simd_*.h."""
    return 8 if ISAS[active().isa].startswith("avx512") else 4


class _Stored(Protocol):
    """`data` [B, H, capacity, D], and with bytes `scale` float32 [B, H, capacity]."""

    data: Tensor
    scale: Tensor | None


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


class NativeLinear(NamedTuple):
    """A linear layer: its weight, its bias [O], and whether x is rounded to int8 before it."""

    weight: Weight
    bias: Tensor | None
    int8: bool


class NativeBlock:
    """A block as the library sees it: it knows where its tensors lie, and must not outlive them."""

    def __init__(
        self,
        layers: Sequence[NativeLinear],
        norms: Sequence[Tensor],
        epsilons: tuple[float, float],
        *,
        heads: int,
        window: int | None,
        activation: int,
    ) -> None:
        """`layers` are q, k, v, out, fc and proj; `norms` are weight and bias [C] of the norm before attention and of
        the one before the MLP."""
        self.layers = layers  # their descriptions are pointed to
        biases = [None if layer.bias is None else layer.bias.data_ptr() for layer in layers]
        self.struct = _Block(
            (_Pointer * _LINEARS)(*[layer.weight.address for layer in layers]),
            (_Pointer * _LINEARS)(*biases),
            (_Pointer * 4)(*[norm.data_ptr() for norm in norms]),
            heads,
            window or 0,
            (ctypes.c_float * 2)(*epsilons),
            activation,
            sum(layer.int8 << number for number, layer in enumerate(layers)),
        )
        self.address = ctypes.addressof(self.struct)

    def step(self, x: Tensor, keys: _Stored, values: _Stored, held: int, keep: Tensor | None) -> Tensor:
        """x[B, T, C] to [B, T, C]; keys and values of the positions are added from `held` on.

        Buffers of `keys` and `values` [B, H, capacity, D] are contiguous; `keep` bool[B, held + T] is False on padding,
        and its rows are contiguous.
        """
        x = x.contiguous()
        y = torch.empty_like(x)
        native = active()
        native.call(
            "nq_step", self.address, x.data_ptr(), *x.shape[:2], keys.data.data_ptr(), values.data.data_ptr(),
            _address(keys.scale), _address(values.scale), STORED[keys.data.dtype], keys.data.shape[2], held,
            _address(keep), 0 if keep is None else keep.stride(0), y.data_ptr(), native.isa, threads(),
        )  # fmt: skip
        return y


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
