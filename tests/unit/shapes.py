"""Checkpoints that are headers only, as they come from the hub: GPT-Neo's real sizes without their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import TINY_CONFIG, tiny_shapes

from neoquant.checkpoint import Checkpoint, TensorHeader
from neoquant.checkpoint.reader import Stored
from neoquant.checkpoint.torch_file import Span


def _config(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    return TINY_CONFIG | {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "attention_types": [[["global", "local"], layers // 2]],
        "attention_layers": ["global", "local"] * (layers // 2),
        "vocab_size": 50257,
        "max_position_embeddings": 2048,
        "window_size": 256,
    }


SIZES = {"125m": _config(12, 768, 12), "1.3b": _config(24, 2048, 16), "2.7b": _config(32, 2560, 20)}


def checkpoint_of(
    config: dict[str, Any],
    *,
    shapes: dict[str, tuple[int, ...]] | None = None,
    dtype: torch.dtype = torch.float16,
    revision: str | None = None,
) -> Checkpoint:
    """A checkpoint of `config` (or of `shapes`) whose weights are nowhere."""
    stored, begin = [], 0
    for name, shape in (tiny_shapes(config) if shapes is None else shapes).items():
        header = TensorHeader(name, dtype, shape)
        stored.append(Stored(header, Path("model.safetensors"), Span(begin, ())))
        begin += header.nbytes
    return Checkpoint("someone/gpt-neo", revision, None, config, stored)
