"""What the bundled model loses on every grid, by each way of rounding to it: from the committed results.

Where GPTQ was measured by the model's loss with several seeds, what it is set beside is of the same documents.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from neoquant.evaluation import Comparison

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "eval" / "results" / "demo.json"
ON_TRELLIS = [ROOT / "eval" / "results" / f"{name}-demo.json" for name in ("trellis", "by-loss", "trellis3")]
OBJECTIVES = ROOT / "eval" / "results" / "objectives-demo.json"

WAYS = ("round-to-nearest", "HQQ", "GPTQ", "GPTQ, by the model's loss")
GRIDS = {  # in words, and the candidates of DEMO and ON_TRELLIS in the order of WAYS
    "int8 rows": ("int8", None, None, None),
    "4 bits, groups of 64": ("affine4-g64", "hqq4-g64", "gptq4-g64", None),
    "MXFP4": ("mxfp4", None, "mxfp4-gptq", None),
    "NF4": ("nf4", None, "nf4-gptq", None),
    "3 bits, groups of 64": ("affine3-g64", "hqq3-g64", "gptq3-g64", None),
    "trellis, 3 bits": (None, None, "trellis3", "trellis3-model"),
    "2 bits, groups of 32": (None, None, "gptq2-g32", None),
    "trellis, 2 bits": (None, None, "tr64d", "trellis2-model"),
}
SEEDS = {  # the same grids in OBJECTIVES, and the tools there
    "4 bits, groups of 64": "4 bits, groups of 64, asymmetric",
    "NF4": "NF4, double quantization",
    "3 bits, groups of 64": "3 bits, groups of 64, asymmetric",
    "2 bits, groups of 32": "2 bits, groups of 32, asymmetric",
}
TOOLS = {"nearest": WAYS[0], "neoquant, attention": WAYS[2], "neoquant": WAYS[3]}


class Choice(NamedTuple):
    """A grid, the bits of a weight of the linear layers on it, and by way of rounding the KL in nats a token."""

    grid: str
    bits: float
    losses: dict[str, float]


def choices() -> list[Choice]:
    """Every grid, those of more bits first."""
    measured, seeds = _measured(), json.loads(OBJECTIVES.read_text("utf-8"))["rows"]
    found = []
    for grid, names in GRIDS.items():
        rows = {way: measured[name] for way, name in zip(WAYS, names, strict=True) if name is not None}
        losses = {way: kl for way, (_, kl) in rows.items()}
        losses |= {TOOLS[row["tool"]]: row["kl"] for row in seeds if row["label"] == SEEDS.get(grid)}
        found.append(Choice(grid, next(iter(rows.values()))[0], losses))
    return sorted(found, key=lambda choice: -choice.bits)


def _measured() -> dict[str, tuple[float, float]]:
    """Candidate -> bits a weight of its linear layers, and KL in nats a token."""
    found = {}
    for candidate in Comparison.from_json(DEMO.read_text("utf-8")).candidates:
        model, kl = candidate.evaluation.model, candidate.total.kl
        assert model.bits_per_weight_linears is not None and kl is not None
        found[model.name.removeprefix("neoquant-demo-")] = model.bits_per_weight_linears, kl
    for row in (row for path in ON_TRELLIS for row in json.loads(path.read_text("utf-8"))["rows"]):
        found[row["name"]] = row["bits_per_weight_linears"], row["loss"]["kl"]
    return found
