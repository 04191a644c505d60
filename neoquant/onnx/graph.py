"""Building an ONNX graph node by node: short names for what is written down often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

CONTRIB = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""
OPSET = 17  # the first with LayerNormalization; nothing newer is needed, and browsers are slow to follow

TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.uint8: TensorProto.UINT8,
    torch.int64: TensorProto.INT64,
}


class Graph:
    """Nodes, weights and the names that were given out. Methods return the name of a result."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.bytes = 0
        self._count = 0
        self._constants: dict[Any, str] = {}
        self._known: dict[str, str] = {}

    def node(self, kind: str, *inputs: str, domain: str = "", name: str | None = None, **attributes: Any) -> str:
        """One node with one result, `name` or a new name; an empty input is left out."""
        self._count += 1
        output = name or f"{kind}_{self._count}"
        node = helper.make_node(kind, list(inputs), [output], name=f"{kind}/{self._count}", domain=domain, **attributes)
        self.nodes.append(node)
        return output

    def weight(self, name: str, tensor: Tensor) -> str:
        """A tensor of the model, once for each name."""
        if name not in self._known:
            held = tensor.detach().cpu().contiguous()
            raw = held.reshape(-1).view(torch.uint8).numpy().tobytes()
            self.weights.append(helper.make_tensor(name, TYPES[held.dtype], held.shape, raw, raw=True))
            self.bytes += len(raw)
            self._known[name] = name
        return name

    def number(self, value: float | int | bool, kind: torch.dtype = torch.float32) -> str:
        """A constant without axes."""
        return self._constant(torch.tensor(value, dtype=kind), (value, kind))

    def integers(self, *values: int) -> str:
        """A constant int64[n]."""
        return self._constant(torch.tensor(values, dtype=torch.int64), values)

    def cast(self, x: str, kind: int) -> str:
        return self.node("Cast", x, to=kind)

    def part(self, x: str, axis: int) -> str:
        """The length of an axis, int64[1]."""
        return self.node("Gather", self.node("Shape", x), self.integers(axis), axis=0)

    def join(self, *parts: str, axis: int) -> str:
        return self.node("Concat", *parts, axis=axis)

    def model(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> onnx.ModelProto:
        """What was built, as a model of these inputs and outputs."""
        graph = helper.make_graph(self.nodes, "gpt-neo", list(inputs), list(outputs), initializer=self.weights)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="neoquant")

    def _constant(self, tensor: Tensor, key: Any) -> str:
        if key not in self._constants:
            self._constants[key] = self.weight(f"constant_{len(self._constants)}", tensor)
        return self._constants[key]


def value(name: str, kind: torch.dtype, *axes: str | int) -> Any:
    """An input or output of the model."""
    return helper.make_tensor_value_info(name, TYPES[kind], list(axes))
