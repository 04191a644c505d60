"""Many prompts together: tokens a second of 1, 8 and 32 sequences.

    python eval/bench/batch.py                              # the bundled model in NF4
    python eval/bench/batch.py --model gpt-neo-1.3B-nf4 --name 1.3b --new-tokens 16

Random prompts of `--prompt-tokens` are read and continued by `--new-tokens`, with exact and with int8 activations. All
in turn, `--repeats` times; figures are medians of the tokens a second of all sequences, without reading the prompts;
ratios are to one sequence in the same turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import ROOT, provenance

BATCHES = (1, 8, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: the bundled model, quantized to NF4")
    parser.add_argument("--name", default="demo", help="of the result")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="default: eval/results/batch-NAME.json")
    args = parser.parse_args()
    target = args.json or ROOT / "eval" / "results" / f"batch-{args.name}.json"
    with tempfile.TemporaryDirectory(prefix="neoquant-bench-") as temp:
        result = bench(args, Path(temp))
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {target}")


def bench(args: argparse.Namespace, temp: Path) -> dict[str, Any]:
    """Tokens a second, by activations and number of sequences."""
    import torch

    from neoquant.generation.generate import stream
    from neoquant.loading.load import load_model
    from neoquant.loading.pretrained import GPTNeoForCausalLM
    from neoquant.quantization.quantize import quantize
    from neoquant.quantization.recipe import Recipe

    torch.set_num_threads(args.threads)
    folder = args.model
    if folder is None:
        source = ROOT / "neoquant" / "demo" / "neoquant-demo"
        folder = quantize(source, temp / "nf4", Recipe.simple(4, "nf4")).folder
    models = {kind: load_model(folder, GPTNeoForCausalLM, device="cpu", activations=kind) for kind in ("exact", "int8")}
    vocabulary = models["exact"].config.vocab_size
    ids = torch.randint(0, vocabulary, (max(BATCHES), args.prompt_tokens), generator=torch.Generator().manual_seed(0))
    rates: dict[str, dict[str, list[float]]] = {kind: {str(b): [] for b in BATCHES} for kind in models}
    for repeat in range(args.repeats + 1):
        for kind, model in models.items():
            for batch in BATCHES if repeat % 2 else BATCHES[::-1]:
                made = stream(model, ids[:batch], max_new_tokens=args.new_tokens, steady=True)
                next(made)
                started = time.perf_counter()
                count = batch * sum(1 for _ in made)
                if repeat:  # the first turn warms up
                    rates[kind][str(batch)].append(count / (time.perf_counter() - started))
    median = {kind: {b: round(statistics.median(found), 1) for b, found in of.items()} for kind, of in rates.items()}
    ratio = {
        kind: {
            batch: round(statistics.median(many / one for one, many in zip(of["1"], found, strict=True)), 2)
            for batch, found in of.items()
        }
        for kind, of in rates.items()
    }
    print(json.dumps({"median": median, "ratio": ratio}, indent=1))
    return {
        "what": f"sequences generated together, {args.name}", "provenance": provenance(("neoquant", "torch")),
        "threads": args.threads, "prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens,
        "tokens_per_s": rates, "median": median, "ratio": ratio,
    }  # fmt: skip


if __name__ == "__main__":
    main()
