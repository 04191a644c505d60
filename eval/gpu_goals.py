"""What the figures of `gpu.py` are to reach on an H100 or H200, and which did."""

from __future__ import annotations

from typing import Any, NamedTuple

TRITON = "triton"


class Goal(NamedTuple):
    """`must` and `aim` are least values, or largest where `must` is the larger one."""

    what: str
    unit: str
    must: float
    aim: float


GOALS = {
    "decode 1.3b": Goal("decode 1.3B NF4, batch 1, context 128: part of the limit", "of the bandwidth", 0.3, 0.5),
    "decode 2.7b": Goal("the same, 2.7B", "of the bandwidth", 0.4, 0.6),
    "decode beside": Goal("decode against transformers + bitsandbytes", "x", 5, 10),
    "affine": Goal("affine 4 bits g64 against NF4", "x", 1.0, 1.2),
    "product nf4": Goal("one-row product 8192 x 2048, cold: NF4", "of the bandwidth", 0.55, 0.70),
    "product affine4": Goal("the same, affine 4 bits", "of the bandwidth", 0.65, 0.80),
    "batch": Goal("batch 32 against batch 1, tokens in all", "x", 15, 22),
    "prefill": Goal("prefill of 2,048 against the plain bf16 model", "x", 0.8, 0.95),
    "evaluate": Goal("evaluation against the plain bf16 model", "x", 0.8, 0.95),
    "gptq": Goal("GPTQ 1.3B, 16 x 512 (658 s on two CPU cores)", "s", 30, 10),
}


def reached(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{goal: what was measured, what it must be, whether it is that}, of those goals whose parts were measured."""
    found = {}
    for name, value in _measured(result).items():
        if value is not None:
            goal = GOALS[name]
            met = value <= goal.must if goal.aim < goal.must else value >= goal.must
            found[name] = {"measured": round(value, 3), "must": goal.must, "aim": goal.aim, "met": met}
    return found


def table(goals: dict[str, dict[str, Any]]) -> str:
    """The goals as Markdown; what was not measured is left empty."""
    lines = ["| | unit | must | aim | measured |", "| --- | --- | --: | --: | --: |"]
    for name, goal in GOALS.items():
        measured = goals.get(name, {}).get("measured", "")
        lines.append(f"| {goal.what} | {goal.unit} | {goal.must:g} | {goal.aim:g} | {measured} |")
    return "\n".join(lines)


def _measured(result: dict[str, Any]) -> dict[str, float | None]:
    parts = {name: part["found"] for name, part in result["parts"].items()}
    nf4, affine = (_decode(parts, "1.3b", f"neoquant {grid}", 1) for grid in ("nf4", "affine4"))
    product = parts.get("1.3b kernels", {}).get("8192x2048", {}).get("1", {})
    return {
        **{f"decode {shape}": _of_limit(result, parts, shape) for shape in ("1.3b", "2.7b")},
        "decode beside": _ratio(nf4, _decode(parts, "1.3b", "transformers nf4", 1)),
        "affine": _ratio(affine, nf4),
        **{f"product {grid}": product.get(f"{grid} {TRITON}", {}).get("of_bandwidth") for grid in ("nf4", "affine4")},
        "batch": _ratio(_decode(parts, "1.3b", "neoquant nf4", 32), nf4),
        **{part: _beside_plain(parts.get(f"1.3b {part}", {})) for part in ("prefill", "evaluate")},
        "gptq": parts.get("1.3b gptq", {}).get("seconds"),
    }


def _decode(parts: dict[str, Any], shape: str, model: str, batch: int) -> float | None:
    """Tokens a second of the faster way, launch by launch or by CUDA graphs."""
    steps = parts.get(f"{shape} decode", {})
    ways = (steps.get(f"{model}, batch {batch}{way}", {}).get("tokens_per_s") for way in ("", ", CUDA graph"))
    return max((rate for rate in ways if rate), default=None)


def _of_limit(result: dict[str, Any], parts: dict[str, Any], shape: str) -> float | None:
    rate = _decode(parts, shape, "neoquant nf4", 1)
    read = parts.get(f"{shape} bytes a token", {}).get("neoquant nf4")
    return rate * read / (result["read_and_write_gb_per_s"] * 1e9) if rate and read else None


def _beside_plain(steps: dict[str, Any]) -> float | None:
    nf4, plain = (steps.get(f"neoquant {name}", {}).get("tokens_per_s") for name in ("nf4", "plain"))
    return _ratio(nf4, plain)


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None
