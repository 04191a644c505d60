"""A quantized model whose scales, biases and norms can be trained, and what of it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neoquant.errors import locate
from neoquant.model.gpt_neo import CausalLM
from neoquant.model.names import in_block
from neoquant.nn.linear import QuantLinear
from neoquant.tensor import QuantizedTensor

SMALLEST = 1 / 16  # of a scale, that is left of it: none changes its sign, or vanishes


class TunableLinear(nn.Module):
    """x[..., I] -> [..., O] by a quantized weight, whose codes stay, and whose scales and bias are parameters.

    q       the weight as it is stored
    change  float32[R, G]: scales are what is stored times 1 + change; None on a grid whose scales are no numbers that
            may be any
    bias    float32[O], or None
    """

    def __init__(self, q: QuantizedTensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.q = q
        self.numbers = q.grid.decoding.by_groups(q.codes, q.params)
        self.scale = self._scale()
        self.natural = None if q.order is None else q.order.long().argsort()
        self.change: nn.Parameter | None = None
        if q.grid.with_scales(q.params, self._scale()) is not None:
            self.change = nn.Parameter(torch.zeros(self.numbers.shape[:2]))
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())

    @property
    def weight(self) -> Tensor:
        """float32[O, I], its columns in their natural order."""
        rows, columns = self.q.shape
        values = (self.numbers * self._changed_scale()[..., None]).flatten(1)
        laid = values[:, :columns] if len(values) == rows else values.flatten()[: rows * columns].view(rows, columns)
        return laid if self.natural is None else laid[:, self.natural]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    @torch.no_grad()
    def settle(self) -> None:
        """Let `q` hold the changed scales as they are stored, and compute with these.

        Raises FormatError where a scale has grown beyond its type.
        """
        if self.change is None or not self.change.any():
            return
        params = self.q.grid.with_scales(self.q.params, self._changed_scale().view(self._scale().shape))
        assert params is not None
        self.q = replace(self.q, params=params)
        self.scale = self._scale()
        self.change.zero_()

    def _changed_scale(self) -> Tensor:
        """As scales are now, float32[R, G]."""
        scale = self.scale.view(self.numbers.shape[:2])
        return scale if self.change is None else scale * (1 + self.change).clamp(min=SMALLEST)

    def _scale(self) -> Tensor:
        """As `q` has them, in the shape that the grid gives them."""
        return self.q.grid.decoding.scale.of(self.q.params)


class Tunable:
    """What can be trained of a model, whose quantized layers are put in place of those that it has.

    layers  quantized layers of its blocks, by name
    plain   parameters beside them, by name: norms, and biases of layers that are not quantized
    """

    def __init__(self, model: CausalLM) -> None:
        model.requires_grad_(False)
        self.layers: dict[str, TunableLinear] = {}
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantLinear) and in_block(name) is not None:
                self.layers[name] = TunableLinear(module.quantized, module.bias)
                model.set_submodule(name, self.layers[name])
        inside = {f"{name}.bias" for name in self.layers}
        norms = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
        self.plain = {
            name: parameter
            for name, parameter in model.named_parameters()
            if name not in inside and (name.endswith(".bias") or name.rpartition(".")[0] in norms)
        }
        for parameter in self.plain.values():
            parameter.requires_grad_()

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for layer in self.layers.values() for parameter in layer.parameters()] + [
            *self.plain.values()
        ]

    def counts(self) -> dict[str, int]:
        """How many numbers of each kind are trained."""
        scales = sum(layer.change.numel() for layer in self.layers.values() if layer.change is not None)
        biases = [layer.bias for layer in self.layers.values() if layer.bias is not None]
        biases += [parameter for name, parameter in self.plain.items() if ".ln_" not in f".{name}"]
        norms = [parameter for name, parameter in self.plain.items() if ".ln_" in f".{name}"]
        return {
            "scales": scales,
            "biases": sum(each.numel() for each in biases),
            "norms": sum(each.numel() for each in norms),
        }

    @torch.no_grad()
    def settle(self, types: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """Let the model compute with what is stored of it; `types` are those of its plain tensors, biases included.

        Returns the plain tensors that are trained as they are stored, by name. Raises FormatError where a scale has
        grown beyond its type.
        """
        found = dict(self.plain)
        for name, layer in self.layers.items():
            with locate(name):
                layer.settle()
            if layer.bias is not None:
                found[f"{name}.bias"] = layer.bias
        stored = {}
        for name, parameter in found.items():
            stored[name] = parameter.detach().to(types[name], copy=True)
            parameter.copy_(stored[name])
        return stored
