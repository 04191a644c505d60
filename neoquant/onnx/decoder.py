"""The network as an ONNX graph, in the order of `model/gpt_neo.py`; names of inputs and outputs are the field's own.

input_ids, position_ids   int64[batch, sequence]
attention_mask            int64[batch, past + sequence], 0 on padding
past_key_values.N.key     float32[batch, heads, past, head size], and .value; likewise present.N
logits                    float32[batch, sequence, vocabulary]
"""

from __future__ import annotations

import math
from typing import Any

import torch
from onnx import TensorProto
from torch import nn

from neoquant.errors import RequestError
from neoquant.model.gpt_neo import Block, CausalLM
from neoquant.onnx.graph import Graph, value
from neoquant.onnx.layers import embedding, linear

LOWEST = torch.finfo(torch.float32).min
PAST, PRESENT = "past_key_values.{}.{}", "present.{}.{}"


def decoder(model: CausalLM) -> tuple[Graph, list[Any], list[Any]]:
    """The graph, its inputs and its outputs."""
    graph, config = Graph(), model.config
    sizes = ("batch", config.num_heads, "past", config.hidden_size // config.num_heads)
    names = [(layer, kind) for layer in range(config.num_layers) for kind in ("key", "value")]
    inputs = [
        value("input_ids", torch.int64, "batch", "sequence"),
        value("attention_mask", torch.int64, "batch", "total"),
        value("position_ids", torch.int64, "batch", "sequence"),
        *(value(PAST.format(*name), torch.float32, *sizes) for name in names),
    ]
    sizes = (*sizes[:2], "total", sizes[3])
    outputs = [
        value("logits", torch.float32, "batch", "sequence", config.vocab_size),
        *(value(PRESENT.format(*name), torch.float32, *sizes) for name in names),
    ]
    network = model.transformer
    x = graph.node(
        "Add",
        embedding(graph, "transformer.wte", network.wte, "input_ids"),
        embedding(graph, "transformer.wpe", network.wpe, "position_ids"),
    )
    masks = _masks(graph, config.window_size)
    block: Any
    for number, block in enumerate(network.h):
        x = _block(graph, number, block, x, masks)
    x = _norm(graph, "transformer.ln_f", network.ln_f, x)
    tied = model.tied_weights() or model.lm_head is getattr(network.wte, "table", None)
    head = "transformer.wte" if tied else "lm_head"
    graph.node("Identity", linear(graph, head, model.lm_head, x), name="logits")
    return graph, inputs, outputs


def _masks(graph: Graph, window: int) -> dict[bool, str]:
    """Where a query of a local (True) or global layer may look: bool [batch, 1, sequence, total]."""
    new, total = graph.part("input_ids", 1), graph.part("attention_mask", 1)
    one = graph.number(1, torch.int64)
    first, end = graph.node("Squeeze", graph.node("Sub", total, new)), graph.node("Squeeze", total)
    queries = graph.node("Unsqueeze", graph.node("Range", first, end, one), graph.integers(1))  # [T, 1]
    keys = graph.node("Range", graph.number(0, torch.int64), end, one)  # [S]
    behind = graph.node("Sub", queries, keys)  # [T, S]
    padding = graph.node("Unsqueeze", graph.cast("attention_mask", TensorProto.BOOL), graph.integers(1, 2))
    causal = graph.node("GreaterOrEqual", behind, graph.number(0, torch.int64))
    near = graph.node("Less", behind, graph.number(window, torch.int64))
    return {
        False: graph.node("And", causal, padding),
        True: graph.node("And", graph.node("And", causal, near), padding),
    }


def _block(graph: Graph, number: int, block: Block, x: str, masks: dict[bool, str]) -> str:
    name = f"transformer.h.{number}"
    inside = _norm(graph, f"{name}.ln_1", block.ln_1, x)
    x = graph.node("Add", x, _attention(graph, number, block, inside, masks))
    inside = _norm(graph, f"{name}.ln_2", block.ln_2, x)
    inner = linear(graph, f"{name}.mlp.c_fc", block.mlp.c_fc, inside)
    if block.mlp.activation is None:
        raise RequestError(f"{name}.mlp.act is none of the activations of GPT-Neo: {', '.join(ACTIVATIONS)}")
    inner = ACTIVATIONS[block.mlp.activation](graph, inner)
    return graph.node("Add", x, linear(graph, f"{name}.mlp.c_proj", block.mlp.c_proj, inner))


def _attention(graph: Graph, number: int, block: Block, x: str, masks: dict[bool, str]) -> str:
    attention, name = block.attn.attention, f"transformer.h.{number}.attn.attention"
    heads = attention.num_heads

    def split(part: str) -> str:  # [B, T, C] -> [B, H, T, D]
        y = linear(graph, f"{name}.{part}", getattr(attention, part), x)
        y = graph.node("Reshape", y, graph.integers(0, 0, heads, -1))
        return graph.node("Transpose", y, perm=[0, 2, 1, 3])

    query, new = split("q_proj"), {"key": split("k_proj"), "value": split("v_proj")}
    held = {
        kind: graph.node("Concat", PAST.format(number, kind), states, axis=2, name=PRESENT.format(number, kind))
        for kind, states in new.items()
    }
    scores = graph.node("MatMul", query, graph.node("Transpose", held["key"], perm=[0, 1, 3, 2]))  # not scaled
    seen = graph.node("Where", masks[attention.local], scores, graph.number(LOWEST))
    y = graph.node("MatMul", graph.node("Softmax", seen, axis=-1), held["value"])
    y = graph.node("Reshape", graph.node("Transpose", y, perm=[0, 2, 1, 3]), graph.integers(0, 0, -1))
    return linear(graph, f"{name}.out_proj", attention.out_proj, y)


def _norm(graph: Graph, name: str, norm: nn.LayerNorm, x: str) -> str:
    weight, bias = (graph.weight(f"{name}.{part}", getattr(norm, part).float()) for part in ("weight", "bias"))
    return graph.node("LayerNormalization", x, weight, bias, axis=-1, epsilon=norm.eps)


def _gelu_tanh(graph: Graph, x: str) -> str:
    cube = graph.node("Mul", graph.node("Mul", x, x), x)
    inner = graph.node("Add", x, graph.node("Mul", cube, graph.number(0.044715)))
    bend = graph.node("Tanh", graph.node("Mul", inner, graph.number(math.sqrt(2 / math.pi))))
    return graph.node("Mul", graph.node("Mul", x, graph.node("Add", bend, graph.number(1.0))), graph.number(0.5))


def _gelu(graph: Graph, x: str) -> str:
    bend = graph.node("Erf", graph.node("Mul", x, graph.number(math.sqrt(0.5))))
    return graph.node("Mul", graph.node("Mul", x, graph.node("Add", bend, graph.number(1.0))), graph.number(0.5))


def _silu(graph: Graph, x: str) -> str:
    return graph.node("Mul", x, graph.node("Sigmoid", x))


def _relu(graph: Graph, x: str) -> str:
    return graph.node("Relu", x)


def _tanh(graph: Graph, x: str) -> str:
    return graph.node("Tanh", x)


ACTIVATIONS = {
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu": _gelu,
    "relu": _relu,
    "silu": _silu,
    "swish": _silu,
    "tanh": _tanh,
}
