"""Speculative decoding on Python text, and what a product costs with 1 to 8 rows.

    python eval/bench/speculative.py                        # the bundled model in NF4
    python eval/bench/speculative.py --model neo-8m --name neo-8m

Files of the standard library are read up to `--prompt-tokens` and continued greedily by `--new-tokens`: one token after
another, with guesses by lookup, and by the same model quantized to 2 bits. All in turn, `--repeats` times; figures are
medians over the turns of the tokens a second over all files, ratios those of a turn. The texts are checked to be equal.
Products are of NF4 weights of 1.3B's and the bundled model's MLP, with exact and with int8 activations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import ROOT, provenance

FILES = ("argparse", "ast", "configparser", "difflib", "json.decoder", "logging", "shutil", "textwrap")
ROWS = range(1, 9)
SHAPES = {"1.3b": (8192, 2048), "bundled": (1024, 256)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: the bundled model")
    parser.add_argument("--name", default="demo", help="of the result")
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="default: eval/results/speculative-NAME.json")
    args = parser.parse_args()
    target = args.json or ROOT / "eval" / "results" / f"speculative-{args.name}.json"
    result = bench(args)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {target}")


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """Both measurements."""
    import torch

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="neoquant-bench-") as temp:
        drafts = drafting(args, Path(temp))
    return {
        "what": f"speculative decoding on Python text, {args.name} in NF4, and products of 1 to 8 rows",
        "provenance": provenance(("neoquant", "torch")), "threads": args.threads, "new_tokens": args.new_tokens,
        "prompt_tokens": args.prompt_tokens, "files": FILES, **drafts, "products": products(args.repeats),
    }  # fmt: skip


def drafting(args: argparse.Namespace, temp: Path) -> dict[str, Any]:
    """Tokens a second of each way, and how many guesses were accepted."""
    import torch

    from neoquant.generation.drafting import ModelDrafter, PromptLookup
    from neoquant.generation.generate import Sampling, stream
    from neoquant.generation.speculative import Acceptance, stream_with_drafts
    from neoquant.loading.load import load_model
    from neoquant.loading.pretrained import GPTNeoForCausalLM, load
    from neoquant.quantization.quantize import quantize
    from neoquant.quantization.recipe import Recipe

    source = args.model or ROOT / "neoquant" / "demo" / "neoquant-demo"
    folder = quantize(source, temp / "nf4", Recipe.simple(4, "nf4")).folder
    small = quantize(source, temp / "two", Recipe.simple(2, "affine", group_size=32)).folder
    model, tokenizer = load(folder, device="cpu")
    draft = load_model(small, GPTNeoForCausalLM, device="cpu")
    prompts = [torch.tensor([tokenizer.prompt_ids(text_of(name))[: args.prompt_tokens]]) for name in FILES]
    ways = {"plain": None, "lookup": lambda: PromptLookup(), "2bit": lambda: ModelDrafter(draft, Sampling())}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    counts = {way: Acceptance() for way in ways}
    for repeat in range(args.repeats + 1):
        texts = {}
        for way, drafter in ways.items() if repeat % 2 else reversed(ways.items()):
            count, spent, made = Acceptance(), 0.0, []
            for prompt in prompts:
                if drafter is None:
                    ids = stream(model, prompt, max_new_tokens=args.new_tokens, steady=True)
                else:
                    ids = stream_with_drafts(
                        model, prompt, drafter(), max_new_tokens=args.new_tokens, acceptance=count, steady=True
                    )  # fmt: skip
                made.append([int(next(ids))])  # the prompt is read: its time is not decoding's
                started = time.perf_counter()
                made[-1] += [int(i) for i in ids]
                spent += time.perf_counter() - started
            texts[way], counts[way] = made, count
            if repeat:
                rates[way].append(len(prompts) * (args.new_tokens - 1) / spent)
        assert texts["plain"] == texts["lookup"] == texts["2bit"], "the texts differ"
    median = {way: round(statistics.median(found), 1) for way, found in rates.items()}
    ratio = {
        way: round(statistics.median(b / a for a, b in zip(rates["plain"], found, strict=True)), 3)
        for way, found in rates.items()
    }
    accepted = {
        way: {"steps": count.steps, "drafted": count.drafted, "accepted": count.accepted}
        for way, count in counts.items() if count.steps
    }  # fmt: skip
    print(json.dumps({"median": median, "ratio": ratio, "accepted": accepted}, indent=1))
    return {"tokens_per_s": rates, "median": median, "ratio": ratio, "accepted": accepted}


def text_of(module: str) -> str:
    """The source of a module of the standard library."""
    import importlib
    import inspect

    return inspect.getsource(importlib.import_module(module))


def products(repeats: int) -> dict[str, dict[str, list[float]]]:
    """The time of a product with 1 to 8 rows, in times of that with one; medians of turns."""
    import torch

    from neoquant.grids import Codebook
    from neoquant.kernels import Cpu, CpuInt8
    from neoquant.nn.linear import QuantLinear
    from neoquant.quantizers import Nearest

    found: dict[str, dict[str, list[float]]] = {}
    for name, shape in SHAPES.items():
        q = Nearest().quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)), Codebook())
        for activations, kernel in (("exact", Cpu()), ("int8", CpuInt8())):
            # As many copies as no cache holds: what decoding reads comes from memory, where the model is not small.
            copies = 8 if shape[0] * shape[1] > 1 << 22 else 1
            layers = [QuantLinear(q, None, kernel) for _ in range(copies)]
            xs = [torch.randn(rows, shape[1]) for rows in ROWS]
            times: list[list[float]] = [[] for _ in ROWS]
            for _ in range(4 * repeats):
                for x, spent in zip(xs, times, strict=True):
                    spent.append(
                        timed(
                            lambda x=x, layers=layers: [layer(x) for layer in layers for _ in range(8 // len(layers))]
                        )
                    )
            one = statistics.median(times[0])
            found.setdefault(name, {})[activations] = [round(statistics.median(each) / one, 2) for each in times]
            print(name, activations, found[name][activations], flush=True)
    return found


def timed(work: Callable[[], object]) -> float:
    import torch

    with torch.inference_mode():
        started = time.perf_counter()
        work()
        return time.perf_counter() - started


if __name__ == "__main__":
    main()
