"""Linear layers and embeddings as ONNX nodes: quantized ones with their own codes and scales, none rounded again.

ONNX Runtime's operators: `MatMulNBits` (integers of 4 or 8 bits in blocks of a row, with scales and zeros) and
`MatMulBnb4` (bitsandbytes' tables over the flattened weight), as its ContribOperators.md specifies them.
"""

from __future__ import annotations

from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor, nn

from neoquant.errors import RequestError
from neoquant.grids import Affine, Codebook, Grid, Int8Rows
from neoquant.nn.linear import QuantEmbedding, QuantLinear
from neoquant.onnx.graph import CONTRIB, Graph
from neoquant.tensor import QuantizedTensor

BLOCKS = (256, 128, 64, 32, 16)  # of a row that shares one scale: its scale is written for each
EXACT = 1  # MatMulNBits' accuracy_level: activations stay float32


def refuse(name: str, layer: QuantLinear) -> str | None:
    """Why ONNX Runtime cannot hold a layer as it is, and what it could; None where it can."""
    grid = layer.grid
    if layer.ordered:
        return f"{name} has an activation order, which its operators do not take: quantize with order = static or off"
    if isinstance(grid, Affine) and grid.float_zero and grid.bits == 8:
        return f"{name} has float16 zeros, which its MatMulNBits takes with 4 bits only, not 8: leave float_zero out"
    if isinstance(grid, Codebook | Int8Rows) or (isinstance(grid, Affine) and grid.bits in (4, 8)):
        return None
    return f"{name} is {grid.name} of {grid.bits} bits; what it holds is nf4, fp4, int8, and affine of 4 or 8 bits"


def linear(graph: Graph, name: str, layer: nn.Module, x: str) -> str:
    """x[B, T, I] through a layer: [B, T, O]."""
    if isinstance(layer, QuantLinear):
        y = _quantized(graph, name, layer.quantized, x)
        bias = layer.bias
    else:
        weight = _as_float(graph, f"{name}.weight", layer.get_parameter("weight"))
        y = graph.node("MatMul", x, graph.node("Transpose", weight, perm=[1, 0]))
        bias = layer._parameters.get("bias")
    return y if bias is None else graph.node("Add", y, graph.weight(f"{name}.bias", bias.float()))


def embedding(graph: Graph, name: str, layer: nn.Module, ids: str) -> str:
    """Rows [B, T, C] of a table."""
    if not isinstance(layer, QuantEmbedding):
        rows = graph.node("Gather", graph.weight(f"{name}.weight", layer.get_parameter("weight")), ids, axis=0)
        return graph.cast(rows, TensorProto.FLOAT)
    q = layer.table.quantized
    if not isinstance(q.grid, Int8Rows):
        raise RequestError(f"{name} is {q.grid.name}; ONNX Runtime looks rows up in int8 tables, or plain ones")
    codes, scales, _, block = blocks_of(q)
    table = graph.node("Gather", graph.weight(f"{name}.codes", codes), ids, axis=0)  # [B, T, G, block]
    numbers = graph.node("Sub", graph.cast(table, TensorProto.FLOAT), graph.number(128.0))
    scale = graph.node("Gather", graph.weight(f"{name}.scales", scales), ids, axis=0)  # [B, T, G]
    values = graph.node("Mul", numbers, graph.node("Unsqueeze", scale, graph.integers(3)))
    padded = graph.node("Reshape", values, graph.integers(0, 0, codes.shape[1] * block))
    columns = q.shape[1]
    if codes.shape[1] * block == columns:
        return padded
    return graph.node("Slice", padded, graph.integers(0), graph.integers(columns), graph.integers(2))


def _quantized(graph: Graph, name: str, q: QuantizedTensor, x: str) -> str:
    rows, columns = q.shape
    size: dict[str, Any] = {"K": columns, "N": rows}
    if isinstance(q.grid, Codebook):
        scale = q.grid.decoding.scale.of(q.params).reshape(-1)
        weights = (graph.weight(f"{name}.codes", flat_codes(q.codes)), graph.weight(f"{name}.absmax", scale))
        kind = {"fp4": 0, "nf4": 1}[q.grid.kind]
        return graph.node(
            "MatMulBnb4", x, *weights, domain=CONTRIB, **size, block_size=q.grid.block_size, quant_type=kind
        )
    codes, scales, zeros, block = blocks_of(q)
    inputs = [graph.weight(f"{name}.codes", codes), graph.weight(f"{name}.scales", scales)]
    if zeros is not None:
        inputs.append(graph.weight(f"{name}.zeros", zeros))
    return graph.node(
        "MatMulNBits", x, *inputs, domain=CONTRIB, **size, bits=q.grid.bits, block_size=block, accuracy_level=EXACT
    )


def flat_codes(codes: Tensor) -> Tensor:
    """Codes uint8[O, I] of 4 bits, two a byte, the first high, over the flattened weight: uint8[ceil(O * I / 2)]."""
    flat = nn.functional.pad(codes.reshape(-1), (0, codes.numel() % 2))
    return flat[0::2] << 4 | flat[1::2]


def blocks_of(q: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """A weight in blocks of a row, as MatMulNBits takes it.

    Codes uint8[O, G, block * bits / 8], low bits first; scales float32[O, G]; zeros uint8[O, ceil(G * bits / 8)], or
    float32[O, G] where they are float16, or None where all are the middle; and the block. A group longer than a block
    has its scale in each of its blocks.
    """
    rows, columns = q.shape
    block = block_size(q.grid, columns)
    count = -(-columns // block)
    codes, scale, zero = _numbers(q)
    padded = nn.functional.pad(codes, (0, count * block - columns))
    scales = _spread(scale, columns, block)
    zeros = None if zero is None else _spread(zero, columns, block)
    if zeros is not None:  # MatMulNBits takes zeros packed as codes are, or in the scales' type
        zeros = zeros.float() if zeros.is_floating_point() else _pack(zeros, q.grid.bits)
    return _pack(padded, q.grid.bits).view(rows, count, -1), scales, zeros, block


def block_size(grid: Grid, columns: int) -> int:
    """A block that every group is made of: the group itself, or the longest that wastes least of a row of one scale."""
    if isinstance(grid, Affine) and 0 < grid.group_size < columns:
        return grid.group_size
    return next((block for block in BLOCKS if columns % block == 0), BLOCKS[-1])


def _numbers(q: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes as unsigned integers, and the scales and zeros [O, G] of their groups."""
    if isinstance(q.grid, Int8Rows):  # two's complement; 128 more is unsigned, with the zero in the middle
        return q.codes ^ 128, q.grid.decoding.scale.of(q.params).view(-1, 1), None
    return q.codes, q.params["scale"].float(), q.params.get("zero")


def _spread(params: Tensor, columns: int, block: int) -> Tensor:
    """What groups [O, G] share, for each of a row's blocks."""
    count = -(-columns // block)
    repeats = count if params.shape[1] == 1 else 1
    return params.repeat_interleave(repeats, dim=1).contiguous()


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8[O, n], low bits first: uint8[O, ceil(n * bits / 8)]."""
    if bits == 8:
        return codes.contiguous()
    codes = nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return codes[:, 0::2] | codes[:, 1::2] << 4


def _as_float(graph: Graph, name: str, weight: Tensor) -> str:
    """A plain weight in its own type, cast where it is used: ONNX Runtime does that once, when it loads."""
    held = graph.weight(name, weight)
    return held if weight.dtype == torch.float32 else graph.cast(held, TensorProto.FLOAT)
