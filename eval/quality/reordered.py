"""The same network with its units in another order: what it computes is the same, which weights share a group is not.

Hidden dimensions, neurons and each head's dimensions may stand in any order, and a head's values may change sign where
the projection behind them does. Each order is another draw of the errors that quantization makes, by which one sees how
much of a figure is the luck of one draw.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HIDDEN_VECTORS = ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "ln_f.weight", "ln_f.bias",
                  "out_proj.bias", "c_proj.bias")  # fmt: skip
COMPANIONS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
              "merges.txt", "special_tokens_map.json")  # fmt: skip


def write_reordered(model: Path, out: Path, seed: int) -> None:
    """The float16 or float32 checkpoint of `model`, one file, in the order that `seed` draws; 0 leaves it as it is."""
    out.mkdir(parents=True)
    for name in COMPANIONS:
        if (model / name).exists():
            shutil.copyfile(model / name, out / name)
    config = json.loads((model / "config.json").read_text("utf-8"))
    tensors = load_file(model / "model.safetensors")
    if seed:
        tensors = reordered(tensors, config["num_heads"], torch.Generator().manual_seed(seed))
    save_file({name: each.contiguous() for name, each in tensors.items()}, out / "model.safetensors", {"format": "pt"})


def reordered(tensors: dict[str, Tensor], heads: int, random: torch.Generator) -> dict[str, Tensor]:
    """All tensors of a GPT-Neo for language modelling in another order."""
    hidden = next(each.shape[1] for name, each in tensors.items() if name.endswith("wte.weight"))
    order = torch.randperm(hidden, generator=random)
    found = dict(tensors)
    blocks = {name.split(".attn.")[0] for name in tensors if ".attn." in name}
    for block in sorted(blocks):
        attention, mlp = f"{block}.attn.attention", f"{block}.mlp"
        neurons = torch.randperm(len(tensors[f"{mlp}.c_fc.weight"]), generator=random)
        keys, values = (_within_heads(hidden, heads, random) for _ in range(2))
        signs = (torch.randint(0, 2, (hidden, 1), generator=random) * 2 - 1).to(tensors[f"{mlp}.c_fc.weight"].dtype)
        for name in (f"{attention}.q_proj.weight", f"{attention}.k_proj.weight"):
            found[name] = found[name][keys][:, order]
        found[f"{attention}.v_proj.weight"] = found[f"{attention}.v_proj.weight"][values][:, order] * signs
        found[f"{attention}.out_proj.weight"] = found[f"{attention}.out_proj.weight"][order][:, values] * signs.T
        found[f"{mlp}.c_fc.weight"] = found[f"{mlp}.c_fc.weight"][neurons][:, order]
        found[f"{mlp}.c_fc.bias"] = found[f"{mlp}.c_fc.bias"][neurons]
        found[f"{mlp}.c_proj.weight"] = found[f"{mlp}.c_proj.weight"][order][:, neurons]
    for name, each in tensors.items():
        if name.endswith(HIDDEN_VECTORS):
            found[name] = each[order]
        if name.endswith(("wte.weight", "wpe.weight", "lm_head.weight")):
            found[name] = each[:, order]
    return found


def _within_heads(hidden: int, heads: int, random: torch.Generator) -> Tensor:
    size = hidden // heads
    return torch.cat([head * size + torch.randperm(size, generator=random) for head in range(heads)])
