"""neoquant's layers inside transformers: decoding and prefill beside transformers' own and neoquant's.

    python eval/bench/inside_transformers.py --shape 125m
    python eval/bench/inside_transformers.py --shape demo

The 125m shape is filled with random float16 weights; `demo` is the bundled model. Both are quantized to NF4 as
bitsandbytes stores it, and to NF4 with an int8 embedding in neoquant's own format. Measured in turn, in one process:
transformers on the plain weights in float32; transformers with bitsandbytes, as it is and as on a CPU without bf16
instructions; transformers with neoquant's layers; neoquant itself. Decoding is transformers' own `generate` (neoquant's
in its own row), greedy and, but for bitsandbytes, with four beams: the time of NEW + 1 tokens less that of one.
Medians of `--repeats` rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quantize_1p3b import PACKAGES, SHAPES, make_source

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import ROOT, provenance
from turns import medians_in_turn

PROMPT, NEW, PREFILL, BEAMS = 32, 16, 256, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("demo", *SHAPES), default="125m")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", type=Path, help="folder to keep the models in, or to find them; default: none")
    parser.add_argument("--json", type=Path, help="default: eval/results/inside-transformers-SHAPE.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="neoquant-bench-") as temp, torch.no_grad():
        models = load(args.shape, args.models or Path(temp))
        if not args.repeats:
            return
        contestants = {name: partial(timings, name, model) for name, model in models.items()}
        rates = medians_in_turn(contestants, args.repeats)
    result = {
        "what": f"tokens per second, {args.shape}, {args.threads} threads, medians of {args.repeats}",
        "prompt": PROMPT, "new": NEW, "prefill": PREFILL, "beams": BEAMS,
        "threads": args.threads, "repeats": args.repeats, "rates": rates, "provenance": provenance(PACKAGES),
    }  # fmt: skip
    target = args.json or ROOT / "eval" / "results" / f"inside-transformers-{args.shape}.json"
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rates, indent=1))


def load(shape: str, temp: Path) -> dict[str, Any]:
    """The models that are compared, by what runs them."""
    import bitsandbytes.nn.modules
    import transformers

    import neoquant
    from neoquant import transformers as inside
    from neoquant.demo import MODEL
    from neoquant.quantization.recipe import Recipe

    plain = MODEL if shape == "demo" else temp / "plain"
    if not plain.exists():
        make_source(shape, plain)
    for name, options in {"nf4": {}, "own": {"embeddings": "int8"}}.items():
        if not (temp / name).exists():
            neoquant.quantize(plain, temp / name, Recipe.simple(4, "nf4", **options))
    theirs = transformers.AutoModelForCausalLM
    found = {
        "transformers, float32": theirs.from_pretrained(plain, dtype=torch.float32),
        "transformers + bitsandbytes, NF4": theirs.from_pretrained(temp / "nf4"),
    }
    has_bf16 = bitsandbytes.nn.modules.has_avx512bf16
    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False  # each layer calls it when it is created
    found["transformers + bitsandbytes, NF4, as without bf16"] = theirs.from_pretrained(temp / "nf4")
    bitsandbytes.nn.modules.has_avx512bf16 = has_bf16
    found |= {
        "transformers + neoquant, NF4": inside.from_pretrained(temp / "nf4"),
        "transformers + neoquant, NF4, int8 embedding": inside.from_pretrained(temp / "own"),
        "neoquant, NF4": neoquant.AutoModelForCausalLM.from_pretrained(temp / "nf4"),
        "neoquant, NF4, int8 embedding": neoquant.AutoModelForCausalLM.from_pretrained(temp / "own"),
    }
    return {name: model.eval() for name, model in found.items()}


def timings(name: str, model: Any) -> dict[str, float]:
    """Tokens per second of one round."""
    ids = torch.randint(1, model.config.vocab_size, (1, PREFILL), generator=torch.Generator().manual_seed(0))
    prefill = seconds(lambda: model(ids, use_cache=True, logits_to_keep=1))
    found = {"prefill": PREFILL / prefill, "decode": NEW / decode_seconds(model, ids[:, :PROMPT], 1)}
    if not name.startswith("neoquant") and "bitsandbytes" not in name:
        found["decode with beams"] = NEW / decode_seconds(model, ids[:, :PROMPT], BEAMS)
    return found


def decode_seconds(model: Any, ids: torch.Tensor, beams: int) -> float:
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
    if beams > 1:
        options |= {"num_beams": beams, "pad_token_id": 0}

    def generate(new: int) -> float:
        return seconds(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **options))

    return generate(NEW + 1) - generate(1)


def seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
