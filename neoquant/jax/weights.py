"""Weights of a layer as JAX holds them: plain, or quantized in bytes and decoded where they are used.

The arithmetic of `neoquant.grids.Decoding`, which is the definition; a test holds the one to the other.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import Tensor

from neoquant import packing
from neoquant.grids import NESTED_GROUP, Scale
from neoquant.tensor import QuantizedTensor

PRECISION = jax.lax.Precision.HIGHEST  # float32 is multiplied as float32 also where a processor would rather not


class FlaxPacked(nnx.Variable[Any]):
    """A tensor of a quantized weight, which is not trained."""


class FlaxWeight(nnx.Module):
    """A matrix [O, I]."""

    def __init__(self, weight: Tensor | QuantizedTensor, dtype: Any) -> None:
        """A plain weight is held in `dtype`; a quantized one as packed codes and the grid's parameters."""
        self.shape = (int(weight.shape[0]), int(weight.shape[1]))
        self.grid = weight.grid if isinstance(weight, QuantizedTensor) else None
        self.ordered = isinstance(weight, QuantizedTensor) and weight.order is not None
        if isinstance(weight, QuantizedTensor):
            self._hold(weight)
        else:
            self.values = nnx.Param(to_jax(weight, dtype))

    def rows(self, ids: Any | None, dtype: Any) -> Any:
        """The rows `ids[...]`, dtype[..., I], or all of them, dtype[O, I]."""
        if self.grid is None:
            values = self.values[...]
            return (values if ids is None else values[ids]).astype(dtype)
        values = self._decode(ids)
        if self.ordered:
            values = jnp.take(values, self.inverse[...], axis=-1)
        return values.astype(dtype)

    def _hold(self, q: QuantizedTensor) -> None:
        trellis = q.grid.decoding.trellis
        self.bits = q.grid.bits if trellis is None else trellis.level_bits  # a trellis is walked once, here
        packed = packing.pack(q.codes if trellis is None else trellis.numbers(q.codes), self.bits)
        if self.bits < 8 and (spare := -packed.shape[1] % self.bits):
            packed = torch.nn.functional.pad(packed, (0, spare))  # whole eights of codes, as `unpack` takes them
        self.codes = FlaxPacked(to_jax(packed))
        for name, param in q.params.items():
            setattr(self, name, FlaxPacked(to_jax(param)))
        decoding = q.grid.decoding
        if decoding.table is not None:
            self.table = FlaxPacked(jnp.array(decoding.table, dtype=jnp.float32))
        if decoding.scale.table is not None:
            self.scale_table = FlaxPacked(jnp.array(decoding.scale.table, dtype=jnp.float32))
        if q.order is not None:
            self.inverse = FlaxPacked(to_jax(q.order.long().argsort().int()))

    def _decode(self, ids: Any | None) -> Any:
        """float32[..., I], columns as they are stored."""
        grid, columns = self.grid, self.shape[1]
        assert grid is not None
        decoding, at = grid.decoding, slice(None) if ids is None else ids
        codes = unpack(self.codes[...][at], self.bits, columns)
        if decoding.table is not None:
            numbers = self.table[...][codes.astype(jnp.int32)]
        elif decoding.signed:
            numbers = jax.lax.bitcast_convert_type(codes, jnp.int8)
        else:
            numbers = codes.astype(jnp.float32)
        if decoding.zero is not None:
            zero = getattr(self, decoding.zero)[...].astype(jnp.float32)
            numbers = numbers - self._spread(zero, ids)
        elif decoding.middle:
            numbers = numbers - decoding.middle
        return numbers * self._spread(self._scales(decoding.scale), ids)

    def _scales(self, scale: Scale) -> Any:
        """The scale of every group, float32."""
        stored = getattr(self, scale.param)[...]
        if scale.table is None:
            return stored.astype(jnp.float32) * scale.factor
        values = self.scale_table[...][stored.astype(jnp.int32)]
        if scale.nested is None:
            return values
        coarse, offset = (getattr(self, name)[...] for name in scale.nested)
        return values * jnp.repeat(coarse, NESTED_GROUP)[: values.size] + offset

    def _spread(self, of_groups: Any, ids: Any | None) -> Any:
        """What belongs to a group, for each of its weights in the rows `ids[...]` (None: all): [..., I]."""
        assert self.grid is not None
        (rows, columns), decoding = self.shape, self.grid.decoding
        width = decoding.width(columns)
        if decoding.flat and columns % width:  # blocks cross rows
            row = jnp.arange(rows) if ids is None else ids
            return of_groups[(row[..., None] * columns + jnp.arange(columns)) // width]
        of_rows = of_groups.reshape(rows, -1)
        return jnp.repeat(of_rows if ids is None else of_rows[ids], width, axis=-1)[..., :columns]


class Linear(nnx.Module):
    """x[..., I] -> [..., O], in x's type. A weight may be shared with an embedding."""

    def __init__(self, weight: FlaxWeight, bias: Tensor | None, dtype: Any) -> None:
        self.weight = weight
        self.bias = None if bias is None else nnx.Param(to_jax(bias, dtype))

    def __call__(self, x: Any) -> Any:
        y = jnp.einsum("...i,oi->...o", x, self.weight.rows(None, x.dtype), precision=PRECISION)
        return y if self.bias is None else y + self.bias[...]


class LayerNorm(nnx.Module):
    """As torch's: mean and variance in float32."""

    def __init__(self, weight: Tensor, bias: Tensor, eps: float, dtype: Any) -> None:
        self.weight, self.bias, self.eps = nnx.Param(to_jax(weight, dtype)), nnx.Param(to_jax(bias, dtype)), eps

    def __call__(self, x: Any) -> Any:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        return (normed * self.weight[...] + self.bias[...]).astype(x.dtype)


def unpack(packed: Any, width: int, n: int) -> Any:
    """The inverse of `packing.pack`: uint8[..., bytes] into the first `n` codes of `width` bits, uint8[..., n].

    Rows hold whole eights of codes, which `width` bytes make.
    """
    if width == 8:
        return packed
    eights = packed.reshape(*packed.shape[:-1], -1, width).astype(jnp.uint32)
    starts, mask = width * jnp.arange(8, dtype=jnp.uint32), jnp.uint32((1 << width) - 1)
    if width <= 4:
        words = sum(eights[..., k] << jnp.uint32(8 * k) for k in range(width))[..., None]
        codes = (words >> starts) & mask
    else:  # eight codes are more than a word: each is taken from the byte that it begins in, and the next
        first = [width * k // 8 for k in range(8)]
        later = [min(byte + 1, width - 1) for byte in first]
        codes = ((eights[..., jnp.array(first)] | eights[..., jnp.array(later)] << jnp.uint32(8)) >> starts % 8) & mask
    return codes.reshape(*packed.shape[:-1], -1)[..., :n].astype(jnp.uint8)


def to_jax(tensor: Tensor, dtype: Any | None = None) -> Any:
    """A tensor as an array of its own, of the same type unless another is named."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:  # numpy has none; every value is a float32
        tensor, dtype = tensor.float(), jnp.bfloat16 if dtype is None else dtype
    return jnp.array(tensor.contiguous().numpy(), dtype=dtype)
