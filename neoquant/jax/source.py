"""Where a JAX model's weights come from: the torch model of the same folder, layer by layer.

So that a checkpoint is read, checked and refused in one place, whoever computes with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flax import nnx
from torch import Tensor, nn

from neoquant.jax.weights import FlaxWeight, LayerNorm, Linear, to_jax
from neoquant.loading.load import load_model
from neoquant.loading.pretrained import PreTrainedModel
from neoquant.model.config import GPTNeoConfig
from neoquant.nn.linear import QuantEmbedding, QuantLinear
from neoquant.tensor import QuantizedTensor


@dataclass(frozen=True)
class TorchSource:
    """A torch model on the CPU whose layers are taken by name, once each."""

    model: PreTrainedModel
    prefix: str = ""

    @classmethod
    def open(cls, source: str | Path, torch_class: type[PreTrainedModel], revision: str | None) -> TorchSource:
        """The folder or hub id as `torch_class`; plain weights lie in the file's own memory until they are taken."""
        return cls(load_model(source, torch_class, revision=revision, dtype="auto", device="cpu"))

    @property
    def config(self) -> GPTNeoConfig:
        return self.model.config

    def inside(self, prefix: str) -> TorchSource:
        """The same, for names behind `prefix`."""
        return TorchSource(self.model, f"{prefix}.")

    def weight(self, name: str, dtype: Any) -> FlaxWeight:
        return FlaxWeight(_matrix(self._module(name)), dtype)

    def table(self, name: str, dtype: Any) -> Any:
        """A table that is never quantized: the position embeddings."""
        return nnx.Param(to_jax(self._module(name).get_parameter("weight"), dtype))

    def linear(self, name: str, dtype: Any) -> Linear:
        module = self._module(name)
        bias = getattr(module, "bias", None)
        made = Linear(FlaxWeight(_matrix(module), dtype), bias, dtype)
        for buffer in list(module._buffers):  # both copies of all layers need not be held at once
            module._buffers[buffer] = torch.empty(0)
        return made

    def norm(self, name: str, eps: float, dtype: Any) -> LayerNorm:
        module = self._module(name)
        return LayerNorm(module.get_parameter("weight"), module.get_parameter("bias"), eps, dtype)

    def _module(self, name: str) -> nn.Module:
        return self.model.get_submodule(self.prefix + name)


def _matrix(module: nn.Module) -> Tensor | QuantizedTensor:
    if isinstance(module, QuantEmbedding):
        return module.table.quantized
    if isinstance(module, QuantLinear):
        return module.quantized
    return module.get_parameter("weight")
