"""Quantized layers as transformers and PEFT know layers: their classes' kind, without a weight to be changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from neoquant.errors import RequestError
from neoquant.nn.linear import QuantEmbedding, QuantLinear, StoredEmbedding, StoredLinear


class TransformersLinear(QuantLinear, nn.Linear):  # type: ignore[misc]  # a quantized layer may have no bias
    """A quantized layer that is an `nn.Linear` for who asks, so that PEFT's own adapters stand beside it."""

    def __init__(self, layer: QuantLinear, computed: torch.dtype) -> None:
        """`layer`'s tensors are shared; `computed` is the type that the model computes in, in which the weight is
        shown."""
        nn.Module.__init__(self)
        self.computed = computed
        self.compute_dtype, self.grid, self.dtype, self.kernel = (
            layer.compute_dtype, layer.grid, layer.dtype, layer.kernel
        )  # fmt: skip
        self.out_features, self.in_features = layer.shape
        for name, tensor in layer.state.items():
            self.register_buffer(name, tensor)
        self.described = layer.described
        self.register_parameter("bias", layer.bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The values [O, I] that the layer multiplies by, to be read: decoded where somebody computes with them."""
        return DecodedWeight(self)

    def reset_parameters(self) -> None:
        """Nothing: what is quantized is not drawn."""


class TransformersEmbedding(QuantEmbedding):
    """A quantized embedding, whose table is a `TransformersLinear`: a tied head is that very layer."""

    def __init__(self, embedding: QuantEmbedding) -> None:
        """`embedding`'s tensors are shared."""
        nn.Module.__init__(self)
        like = embedding.get_buffer("like")
        self.table: TransformersLinear = TransformersLinear(embedding.table, like.dtype)
        self.register_buffer("like", like, persistent=False)
        self.num_embeddings, self.embedding_dim = self.table.shape

    @property
    def weight(self) -> Tensor:
        """The rows [V, C], as the table shows them."""
        return DecodedWeight(self.table)


class ReadOnlyError(RequestError, RuntimeError):
    """A quantized weight was to be written to. A RuntimeError, too: torch raises one for tensors that are read-only."""


class DecodedWeight(Tensor):
    """A quantized weight as a tensor of its values, for programs that read a layer's `weight` instead of calling it.

    TRL computes its losses with that of the head, PEFT's DoRA with every one's. Type, shape and device are known
    without a value; the first operation decodes the weight, which is kept as long as this tensor is. What is written
    to it would have to be rounded again: that is a ReadOnlyError. What operations give (slices, copies) is torch's own,
    and no longer the layer's.
    """

    _layer: TransformersLinear
    _kept: Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, layer: TransformersLinear) -> DecodedWeight:
        shown: DecodedWeight = torch.Tensor._make_wrapper_subclass(
            cls, layer.shape, dtype=layer.computed, device=layer.qweight.device
        )
        shown._layer, shown._kept = layer, None
        return shown

    def __init__(self, layer: TransformersLinear) -> None:
        pass

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """`func` with the values in the places of such tensors."""
        given: dict[str, Any] = kwargs or {}
        for number, argument in enumerate(func._schema.arguments):
            value = args[number] if number < len(args) else given.get(argument.name)
            if isinstance(value, cls) and argument.alias_info is not None and argument.alias_info.is_write:
                raise cls._refusal()
        return func(*tree_map(_decoded, args), **tree_map(_decoded, given))

    def decoded(self) -> Tensor:
        """The values [O, I], as a tensor of torch's own."""
        if self._kept is None:
            self._kept = self._layer.quantized.dequantize(self.dtype)
        return self._kept

    @property
    def data(self) -> Tensor:
        """This tensor: it has no gradient."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        raise self._refusal()

    @staticmethod
    def _refusal() -> ReadOnlyError:
        return ReadOnlyError(
            "a quantized weight cannot be written to, which would round it again: adapters stay beside it, and "
            "model.dequantize() makes plain layers"
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DecodedWeight({tuple(self.shape)}, dtype={self.dtype}, of {self._layer.grid})"


def _decoded(value: Any) -> Any:
    return value.decoded() if isinstance(value, DecodedWeight) else value


def plain_layer(layer: nn.Module, dtype: torch.dtype) -> nn.Module | None:
    """A layer of torch's own with the values of one of neoquant's; None for any other."""
    if isinstance(layer, QuantLinear):
        return _linear(layer.quantized.dequantize(dtype), layer.bias, dtype)
    if isinstance(layer, StoredLinear):
        return _linear(layer.weight.detach(), layer.bias, dtype)
    if isinstance(layer, QuantEmbedding):
        return _embedding(layer.table.quantized.dequantize(dtype))
    if isinstance(layer, StoredEmbedding):
        return _embedding(layer.weight.detach().to(dtype))
    return None


def _embedding(table: Tensor) -> nn.Embedding:
    plain = nn.Embedding(table.shape[0], table.shape[1], device="meta")
    plain.weight = nn.Parameter(table)
    return plain


def _linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(weight.to(dtype))
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(dtype))
    return plain
