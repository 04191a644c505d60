"""New positions of sequences through whole blocks, in C. All is float32 on the CPU; the caller sees to shapes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from neoquant.native.loader import ISAS, active, address, threads
from neoquant.native.products import Weight

ACTIVATIONS = {"gelu_new": 1, "gelu_pytorch_tanh": 1, "relu": 2}  # by their number in weight.h

STORED = {torch.float32: 0, torch.float16: 1, torch.uint8: 2}
"""How keys and values may be held, by their number in weight.h; bytes have a scale for each head and position."""

_LINEARS = 6
_WIDE = ("avx512", "avx512vnni", "amx")  # vectors of 512 bits
_Pointer = ctypes.c_void_p


def outruns_torch() -> bool:
    """Whether many rows meet a weight that is not quantized faster here than in torch: measured with AVX-512 (twice as
    fast) and AVX2 (as fast)."""
    return ISAS[active().isa] in _WIDE


def rows_alike() -> int:
    """Up to how many rows together each get the bits that they get alone: FEW_MOST in simd_*.h."""
    return 8 if ISAS[active().isa] in _WIDE else 4


class StateBuffer(Protocol):
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


class _Cached(ctypes.Structure):
    """`struct nq_cached`."""

    _fields_ = (
        *((name, _Pointer) for name in ("keys", "key_scale", "values", "value_scale")),
        *((name, ctypes.c_int64) for name in ("capacity", "held", "forgotten", "stored")),
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
        self.size = sum(layer.weight.rows * layer.weight.columns for layer in layers)
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


class CachedStates:
    """What a cache holds of blocks one behind the other, as the library sees it. It is one caller's at a time."""

    def __init__(self, blocks: int) -> None:
        self.array = (_Cached * blocks)()
        self._each = list(self.array)  # views of the same memory, which take a while to make

    def hold(self, number: int, keys: StateBuffer, values: StateBuffer) -> None:
        """Where the keys and values of a block lie: contiguous buffers [B, H, capacity, D], which the caller keeps."""
        one = self._each[number]
        one.keys, one.key_scale = keys.data.data_ptr(), address(keys.scale)
        one.values, one.value_scale = values.data.data_ptr(), address(values.scale)
        one.capacity, one.stored = keys.data.shape[2], STORED[keys.data.dtype]

    def count(self, number: int, held: int, forgotten: int) -> None:
        """So many positions of a block are held, behind so many that are no longer."""
        one = self._each[number]
        one.held, one.forgotten = held, forgotten


class NativeBlocks:
    """Blocks one behind the other."""

    def __init__(self, blocks: Sequence[NativeBlock]) -> None:
        self.blocks = blocks  # their descriptions are pointed to
        self._addresses = (_Pointer * len(blocks))(*[block.address for block in blocks])

    def step(self, x: Tensor, cached: CachedStates, keep: Tensor | None) -> Tensor:
        """x[B, T, C] to [B, T, C]; keys and values of the positions are added to `cached`, behind those held.

        `keep` bool[B, forgotten + held + T] is False on padding, and its rows are contiguous.
        """
        x = x.contiguous()
        y = torch.empty_like(x)
        native = active()
        rows, positions, _ = x.shape
        native.call(
            "nq_steps", self._addresses, cached.array, len(self.blocks), x.data_ptr(), rows, positions,
            address(keep), 0 if keep is None else keep.stride(0), y.data_ptr(), native.isa, threads(),
        )  # fmt: skip
        return y
