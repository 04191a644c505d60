"""ONNX Runtime on what `neoquant convert --to onnx` writes, beside neoquant on the same codes.

    python eval/bench/onnx_runtime.py --shape demo
    python eval/bench/onnx_runtime.py --shape 125m

`demo` is the bundled model; the 125m shape is filled with random float16 weights. Both are quantized to NF4 and to
affine 4 bits in groups of 64, and run on the CPU by ONNX Runtime and by neoquant, in float32 and with the embedding in
half precision, in turn: prefill of one text of PREFILL tokens, and decoding of NEW tokens behind PROMPT, greedily, one
call a token. Medians of `--repeats` rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quantize_1p3b import SHAPES, make_source

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import ROOT, provenance
from turns import medians_in_turn

PROMPT, NEW, PREFILL = 32, 32, 256
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {"nf4": ("nf4", {}), "affine4-g64": ("affine", {"group_size": 64})}
Run = Callable[[torch.Tensor, Any], tuple[torch.Tensor, Any]]
"""Ids [1, T] and what the last call gave behind the logits -> logits [1, T or 1, V], and that."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("demo", *SHAPES), default="125m")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="default: eval/results/onnx-runtime-SHAPE.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="neoquant-bench-") as temp, torch.inference_mode():
        runs = load(args.shape, Path(temp), args.threads)
        rates = measure(runs, args.repeats)
    result = {
        "what": f"tokens per second on a CPU, {args.shape}, medians of {args.repeats}",
        "shape": args.shape, "threads": args.threads, "prompt": PROMPT, "new": NEW, "prefill": PREFILL, "rates": rates,
        "provenance": provenance(("neoquant", "torch", "onnx", "onnxruntime")),
    }  # fmt: skip
    target = args.json or ROOT / "eval" / "results" / f"onnx-runtime-{args.shape}.json"
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rates, indent=1))


def load(shape: str, temp: Path, threads: int) -> dict[str, dict[str, Run]]:
    """What runs each recipe's model: recipe -> program -> run."""
    import neoquant
    from neoquant.demo import MODEL
    from neoquant.onnx import export

    plain = MODEL if shape == "demo" else temp / "plain"
    if shape != "demo":
        make_source(shape, plain)
    runs: dict[str, dict[str, Run]] = {}
    for name, (kind, options) in RECIPES.items():
        folder = temp / name
        neoquant.quantize(plain, folder, neoquant.Recipe.simple(4, kind, **options))
        made = export(folder, temp / f"{name}-onnx")
        model = neoquant.AutoModelForCausalLM.from_pretrained(folder).eval()
        runs[name] = {"neoquant": ours(model), "ONNX Runtime": theirs(made.file, threads)}
    return runs


def ours(model: Any) -> Run:
    def run(ids: torch.Tensor, past: Any) -> tuple[torch.Tensor, Any]:
        out = model(ids, past_key_values=past, use_cache=True)
        return out.logits, out.past_key_values

    return run


def theirs(file: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    pasts = {each.name: each.shape for each in session.get_inputs() if each.name.startswith("past")}

    def run(ids: torch.Tensor, past: Any) -> tuple[torch.Tensor, Any]:
        if past is None:
            past = {name: torch.zeros(1, shape[1], 0, shape[3]).numpy() for name, shape in pasts.items()}
        held = next(iter(past.values())).shape[2]
        total = held + ids.shape[1]
        given = {
            "input_ids": ids.numpy(),
            "position_ids": torch.arange(held, total)[None].numpy(),
            "attention_mask": torch.ones(1, total, dtype=torch.int64).numpy(),
        }
        logits, *present = session.run(None, given | past)
        return torch.from_numpy(logits), dict(zip(pasts, present, strict=True))

    return run


def measure(runs: dict[str, dict[str, Run]], repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    """Medians of tokens per second: recipe -> program -> prefill and decode."""
    contestants = {
        (recipe, program): partial(timings, run)
        for recipe, programs in runs.items()
        for program, run in programs.items()
    }
    found = medians_in_turn(contestants, repeats)
    return {recipe: {program: found[recipe, program] for program in programs} for recipe, programs in runs.items()}


def timings(run: Run) -> dict[str, float]:
    """Tokens per second of one round."""
    ids = torch.randint(1, 256, (1, PREFILL), generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    run(ids, None)
    prefill = PREFILL / (time.perf_counter() - started)
    logits, past = run(ids[:, :PROMPT], None)
    started = time.perf_counter()
    for _ in range(NEW):
        logits, past = run(logits[:, -1:].argmax(-1), past)
    return {"prefill": prefill, "decode": NEW / (time.perf_counter() - started)}


if __name__ == "__main__":
    main()
