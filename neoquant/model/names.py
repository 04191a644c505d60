"""What the tensors of a GPT-Neo are called, in files and in the model: the one place that knows.

Names are Hugging Face's, as in the causal language model: `transformer.h.0.attn.attention.q_proj.weight`. A bare
`GPTNeoModel`'s checkpoint leaves `transformer.` out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

BASE_PREFIX = "transformer."

EMBEDDING, TIED_HEAD = "transformer.wte.weight", "lm_head.weight"
"""The token embedding, and the language model's head, which is the same tensor where the configuration ties them."""

TABLES = ("transformer.wte", "lm_head")
"""The layers whose weight has a row for each token of the vocabulary."""

TASK_HEADS = {"SEQ_CLS": "score", "TOKEN_CLS": "classifier", "QUESTION_ANS": "qa_outputs"}
"""PEFT's name of a task -> the head that its model has in place of `lm_head`."""

HEADS = ("lm_head", *TASK_HEADS.values())

SHARED_INPUTS = (
    ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
    ("attn.attention.out_proj",),
    ("mlp.c_fc",),
    ("mlp.c_proj",),
)
"""The linear layers of a block, in the order of computing; those of one tuple see the same inputs."""

BLOCK_LINEARS = tuple(name for together in SHARED_INPUTS for name in together)
"""The layers of a block whose weights may be quantized."""

_IN_BLOCK = re.compile(r"(?:.*\.)?h\.(\d+)\.(.+)")


def in_block(name: str) -> tuple[int, str] | None:
    """The number of the block that a layer or tensor belongs to, and its name inside; None outside the blocks."""
    found = _IN_BLOCK.fullmatch(name)
    return (int(found[1]), found[2]) if found else None


def is_mask_buffer(tensor: str) -> bool:
    """Whether a tensor is a causal mask, or the number it is filled with, which old checkpoints carry.

    Only out_proj has a true bias, and that is called `attn.attention.out_proj.bias`.
    """
    place = in_block(tensor)
    return place is not None and place[1] in ("attn.attention.bias", "attn.attention.masked_bias")


def canonical_layer(tensor: str) -> str:
    """The layer's name as in the causal language model; a bare base model's tensors lack the `transformer.` prefix."""
    layer = tensor.rpartition(".")[0] or tensor
    if layer.split(".", 1)[0] in ("transformer", *HEADS):
        return layer
    return f"{BASE_PREFIX}{layer}"


def is_block_linear(layer: str) -> bool:
    """Whether a layer, by its canonical name, is one of `BLOCK_LINEARS` in some block."""
    place = in_block(layer)
    return layer.startswith(BASE_PREFIX) and place is not None and place[1] in BLOCK_LINEARS


def left_out(layers: Iterable[str]) -> list[str]:
    """How a quantized checkpoint's config.json names the linear `layers` that stay plain.

    Readers compare these with whole names or with their ends, and every model class may read the checkpoint: names are
    without the prefix that a bare base model has not, and the heads of all classes are among them.
    """
    return list(dict.fromkeys([*(layer.removeprefix(BASE_PREFIX) for layer in layers), *HEADS]))


def canonical_tensor(tensor: str) -> str:
    """The tensor's name as in the causal language model."""
    layer, _, last = tensor.rpartition(".")
    return f"{canonical_layer(tensor)}.{last}" if layer else canonical_layer(tensor)
