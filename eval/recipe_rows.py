"""Print rows of recipes/README.md: a recipe's bits per weight and sizes, as its plans for GPT-Neo's sizes say.

python eval/recipe_rows.py NAME...          # all, without a name
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from neoquant.checkpoint import Checkpoint, TensorHeader
from neoquant.checkpoint.stored import Span, Stored
from neoquant.model.config import GPTNeoConfig
from neoquant.model.shapes import network_shapes
from neoquant.quantization.plan import make_plan
from neoquant.quantization.recipe import Recipe, recipe_names

SIZES = {"125M": (12, 768, 12), "1.3B": (24, 2048, 16), "2.7B": (32, 2560, 20)}
"""EleutherAI's GPT-Neo: layers, hidden size, heads."""

READERS = {"bitsandbytes": "yes", "gptq": "with GPTQModel"}
"""What transformers needs to read a family of formats."""


def row(name: str) -> str:
    """The line of the recipe of that name."""
    recipe = Recipe.load(name)
    plans = {size: make_plan(headers_of(*shape), recipe) for size, shape in SIZES.items()}
    sizes = " | ".join(f"{plan.weights_bytes / 1e6:,.0f}" for plan in plans.values())
    plan = plans["1.3B"]
    reader = READERS.get(plan.format.family, "no")
    return f"| [{name}]({name}.toml) | {plan.bits_per_weight_linears:.2f} | {sizes} | {reader} |"


def headers_of(layers: int, hidden: int, heads: int) -> Checkpoint:
    """The headers of a float16 checkpoint of these sizes, without its weights."""
    config: dict[str, Any] = {
        "model_type": "gpt_neo",
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "attention_types": [[["global", "local"], layers // 2]],
        "dtype": "float16",
    }
    stored, begin = [], 0
    for name, shape in network_shapes(GPTNeoConfig.from_dict(config)).items():
        header = TensorHeader(name, torch.float16, shape)
        stored.append(Stored(header, Path("model.safetensors"), Span(begin, ())))
        begin += header.nbytes
    return Checkpoint("gpt-neo", None, None, config, stored)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    for name in parser.parse_args().names or recipe_names():
        print(row(name))


if __name__ == "__main__":
    main()
