"""Quantized layers as transformers and PEFT know layers: their classes' kind, without a weight to be changed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neoquant.nn.linear import QuantEmbedding, QuantLinear, StoredEmbedding, StoredLinear


class TransformersLinear(QuantLinear, nn.Linear):  # type: ignore[misc]  # a quantized layer may have no bias
    """A quantized layer that is an `nn.Linear` for who asks, so that PEFT's own adapters stand beside it."""

    def __init__(self, layer: QuantLinear) -> None:
        """`layer`'s tensors are shared."""
        nn.Module.__init__(self)
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
        """What holds the quantized weight, packed, as bitsandbytes' layers show theirs: it tells where it lies. It is
        no floating-point tensor, so that nothing can be added to it; `quantized.dequantize()` gives the values."""
        return self.qweight.detach()

    def reset_parameters(self) -> None:
        """Nothing: what is quantized is not drawn."""


class TransformersEmbedding(QuantEmbedding):
    """A quantized embedding, whose table is a `TransformersLinear`: a tied head is that very layer."""

    def __init__(self, embedding: QuantEmbedding) -> None:
        """`embedding`'s tensors are shared."""
        nn.Module.__init__(self)
        self.table = TransformersLinear(embedding.table)
        self.register_buffer("like", embedding.get_buffer("like"), persistent=False)
        self.num_embeddings, self.embedding_dim = self.table.shape


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
