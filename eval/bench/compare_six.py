"""Comparing six candidates in one pass beside evaluating each model by itself.

    python eval/bench/compare_six.py                     # the bundled model, a document of each subset of its own suite
    python eval/bench/compare_six.py --base MODEL --suite pile-smoke --documents 2

The base is quantized by six recipes. Then, `--repeats` times and in turn, `neoquant compare` scores the base and all
six side by side, and `neoquant eval` scores each of the seven alone, on the same windows, every run in a process of its
own. Compared are the seconds of reading and scoring (the result's own `seconds`), without the start of a process and
the loading of models, of which comparing in one pass saves some: their ratio is what agreement, divergence, quantiles
and the worst passages cost, less the tokenizing that is done once. The seconds of the whole processes are kept too.
Every model's loss must be the same both ways.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import ROOT, provenance

RECIPES = ("int8", "nf4-single", "nf4", "fp4", "mixed", "nf4-edges")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="neoquant-demo")
    parser.add_argument("--suite", default="demo")
    parser.add_argument("--data", help="documents to read instead of the suite's")
    parser.add_argument("--documents", type=int, default=1, help="at most so many of each subset")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--temp", type=Path, help="where the models are written, and deleted afterwards")
    parser.add_argument("--json", type=Path, default=ROOT / "eval" / "results" / "compare-six.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="neoquant-bench-", dir=args.temp) as temp:
        result = bench(args, Path(temp))
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {args.json}")


def bench(args: argparse.Namespace, temp: Path) -> dict[str, Any]:
    """Make the candidates, then measure both ways in turn."""
    models = [args.base]
    for recipe in RECIPES:
        neoquant("quantize", args.base, "--recipe", recipe, "--out", temp / recipe)
        models.append(str(temp / recipe))
    text: list[object] = ["--suite", args.suite, "--documents", args.documents]
    text += ["--data", args.data] if args.data else []
    repeats: list[dict[str, Any]] = []
    for repeat in range(args.repeats):
        # The order alternates, so that neither way always runs first.
        ways = [together, apart] if repeat % 2 == 0 else [apart, together]
        found = {way.__name__: way(models, text, temp) for way in ways}
        nats = [way.pop("nats") for way in found.values()]
        off = max(abs(a - b) for a, b in zip(*nats, strict=True))
        if off > 1e-6:
            raise SystemExit(f"a model's loss differs by {off:.1e} nats a token between the two ways")
        ratio = {key: round(found["together"][key] / found["apart"][key], 4) for key in ("seconds", "wall_s")}
        repeats.append({**found, "together_over_apart": ratio, "largest_difference_nats_per_token": off})
        print(
            f"{repeat + 1}/{args.repeats} together {found['together']['seconds']:.2f} s, apart "
            f"{found['apart']['seconds']:.2f} s: {ratio['seconds']:.3f} of it (whole processes {ratio['wall_s']:.3f}); "
            f"losses differ by {off:.1e} nats at most",
            flush=True,
        )
    ratios = {
        key: {
            name: round(pick([run["together_over_apart"][key] for run in repeats]), 4)
            for name, pick in (("median", statistics.median), ("least", min), ("most", max))
        }
        for key in ("seconds", "wall_s")
    }
    print(f"median: {ratios['seconds']['median']:.3f} of the evaluations' seconds")
    reference = json.loads((temp / "compare.json").read_text("utf-8"))["reference"]
    return {
        "what": f"{reference['model']['name']} and {len(RECIPES)} candidates: compared in one pass, and each evaluated "
        "by itself",
        "recipes": RECIPES,
        "suite": {key: reference["suite"][key] for key in ("name", "protocol", "context")},
        **{key: reference["total"][key] for key in ("documents", "tokens")},
        "data_sha256": reference["data"]["sha256"],
        "provenance": provenance(("neoquant", "torch", "tokenizers")),
        "together_over_apart": ratios,
        "repeats": repeats,
    }


def together(models: list[str], text: list[object], temp: Path) -> dict[str, Any]:
    """All models in one comparison."""
    wall, result = measured("compare", *models, *text, temp=temp)
    evaluations = [result["reference"], *(candidate["evaluation"] for candidate in result["candidates"])]
    return {
        "seconds": result["reference"]["seconds"],  # of all models together
        "wall_s": wall,
        "nats": [evaluation["total"]["nats_per_token"] for evaluation in evaluations],
    }


def apart(models: list[str], text: list[object], temp: Path) -> dict[str, Any]:
    """Each model by itself, added up."""
    runs = [measured("eval", model, *text, temp=temp) for model in models]
    return {
        "seconds": sum(result["seconds"] for _, result in runs),
        "wall_s": round(sum(wall for wall, _ in runs), 3),
        "each": [result["seconds"] for _, result in runs],
        "nats": [result["total"]["nats_per_token"] for _, result in runs],
    }


def measured(verb: str, *arguments: object, temp: Path) -> tuple[float, dict[str, Any]]:
    """The seconds of the whole process, and the result that it wrote."""
    path = temp / f"{verb}.json"
    started = time.perf_counter()
    neoquant(verb, *arguments, "--json", path)
    wall = round(time.perf_counter() - started, 3)
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return wall, found


def neoquant(*arguments: object) -> None:
    """Run a verb in a fresh process, with this checkout to import."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "neoquant", "--quiet", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"neoquant {' '.join(map(str, arguments))} failed:\n{done.stderr}")


if __name__ == "__main__":
    main()
