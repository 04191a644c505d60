"""Decoding behind a short and a long text, by the type that keys and values are held in, and transformers beside it.

    python eval/bench/context.py --shape 125m
    python eval/bench/context.py --shape 1.3b --model gpt-neo-1.3B-nf4 --without-transformers

Random weights of the model's exact shapes in NF4 with an int8 embedding, or `--model`, a folder. For each type a random
text is read once up to each of `--positions`; then, `--repeats` times and in turn, `--new-tokens` tokens are decoded
behind each, and taken back. transformers runs the plain weights in float32. Figures are
medians; each ratio is of the last position to the first in the same turn.
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

from quantize_1p3b import PACKAGES, SHAPES, make_source
from run_models import quantized

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import ROOT, provenance

MODEL = "nf4-int8-embedding"
Decode = Callable[[int], None]
"""So many tokens, one after another."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="125m")
    parser.add_argument("--model", type=Path, help="a folder of that shape instead of random weights")
    parser.add_argument("--plain", type=Path, help="the same before quantization, for transformers")
    parser.add_argument("--positions", type=int, nargs="+", default=[100, 2000])
    parser.add_argument("--new-tokens", type=int, default=12, help="at most 16, which a cache takes back")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--without-transformers", action="store_true")
    parser.add_argument("--temp", type=Path, help="where the models are written, and deleted afterwards")
    parser.add_argument("--json", type=Path, help="default: eval/results/context-SHAPE.json")
    args = parser.parse_args()
    target = args.json or ROOT / "eval" / "results" / f"context-{args.shape}.json"
    with tempfile.TemporaryDirectory(prefix="neoquant-bench-", dir=args.temp) as temp:
        plain, folder = args.plain or Path(temp) / "plain", args.model
        if folder is None:
            make_source(args.shape, plain)
            folder = quantized(plain, Path(temp), [MODEL])[0]
        result = bench(folder, None if args.without_transformers else plain, args)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {target}")


def bench(folder: Path, plain: Path | None, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of each way at each position, in turn."""
    import torch

    from neoquant.loading.load import load_model
    from neoquant.loading.pretrained import GPTNeoForCausalLM
    from neoquant.model.stored_states import STORAGES

    torch.set_num_threads(args.threads)
    ways: dict[str, dict[int, Decode]] = {}
    held: dict[str, int] = {}
    text = torch.randint(0, 50257, (1, max(args.positions)), generator=torch.Generator().manual_seed(0))
    model = load_model(folder, GPTNeoForCausalLM, device="cpu")
    for storage in STORAGES:
        ways[storage], held[storage] = ours(model, storage, text, args.positions)
    if plain is not None:
        ways["transformers"] = theirs(plain, text, args.positions)
    runs: dict[str, dict[str, list[float]]] = {way: {str(p): [] for p in args.positions} for way in ways}
    for repeat in range(args.repeats + 1):
        for way in ways if repeat % 2 else reversed(list(ways)):
            for position, decode in ways[way].items():
                started = time.perf_counter()
                decode(args.new_tokens)
                if repeat:  # the first turn warms up
                    runs[way][str(position)].append(args.new_tokens / (time.perf_counter() - started))
    first, last = str(args.positions[0]), str(args.positions[-1])
    median = {
        way: {at: round(statistics.median(found), 2) for at, found in rates.items()} for way, rates in runs.items()
    }
    ratio = {
        way: round(statistics.median(b / a for a, b in zip(rates[first], rates[last], strict=True)), 3)
        for way, rates in runs.items()
    }
    print(json.dumps({"median": median, "ratio": ratio, "cache_bytes": held}, indent=1))
    return {
        "what": f"decoding behind a text, GPT-Neo {args.shape} shapes, {folder.name}",
        "provenance": provenance(PACKAGES), "threads": args.threads, "new_tokens": args.new_tokens,
        "tokens_per_s": runs, "median": median, "ratio": ratio, "cache_bytes": held,
    }  # fmt: skip


def ours(model: Any, storage: str, text: Any, positions: list[int]) -> tuple[dict[int, Decode], int]:
    """What decodes behind each length of text, and the bytes that the longest one's keys and values take."""
    import torch

    from neoquant.model.cache import KVCache

    ways, cache = {}, KVCache(0)
    for position in positions:
        cache = KVCache.of(model.config, position + 16, storage)
        with torch.inference_mode():
            model(text[:, :position], past_key_values=cache, logits_to_keep=1)

        def decode(count: int, cache: Any = cache, position: int = position) -> None:
            with torch.inference_mode():
                ids = text[:, :1]
                for _ in range(count):
                    ids = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1)[:, None]
            cache.crop(position)

        ways[position] = decode
    return ways, cache.nbytes


def theirs(folder: Path, text: Any, positions: list[int]) -> dict[int, Decode]:
    """The same with transformers, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.train(False)
    ways = {}
    for position in positions:
        with torch.inference_mode():
            read = model(text[:, :position], use_cache=True, logits_to_keep=1).past_key_values

        def decode(count: int, read: Any = read, position: int = position) -> None:
            with torch.inference_mode():
                ids = text[:, :1]
                for _ in range(count):
                    out = model(ids, past_key_values=read, use_cache=True, logits_to_keep=1)
                    ids = out.logits[:, -1].argmax(-1)[:, None]
            read.crop(position - read.get_seq_length())  # so many at the end

        ways[position] = decode
    return ways


if __name__ == "__main__":
    main()
