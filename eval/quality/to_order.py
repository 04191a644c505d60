"""Mixed precision to order beside one grid for all layers, at the same bits and rounded alike: foreseen and measured
loss.

    python eval/quality/to_order.py MODEL --text documents.jsonl --json eval/results/to-order-NAME.json

Calibrates and scores as feedback.py does. For each uniform grid, layers are put on several grids at no more than its
bits a weight of the linears, and at the targets given besides. KL divergence is from the unquantized model, in nats a
token.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from candidates import file_sha256, load_dense, rows_sha256, source_sha256
from provenance import provenance
from texts import texts

import neoquant
from neoquant.calibration.dataset import Calibration
from neoquant.checkpoint import open_checkpoint
from neoquant.evaluation import EvaluatedModel, ModelInfo, compare
from neoquant.evaluation.statistics import ratio_interval
from neoquant.grids import Affine
from neoquant.loading.pretrained import load_tokenizer
from neoquant.quantization.allocation import QUANTIZER, allocate
from neoquant.quantization.foreseeing import foresee

UNIFORM = (Affine(3, 64), Affine(4, 64))


def main() -> None:
    args = parse()
    tokenizer = load_tokenizer(args.model)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        shown = texts(
            args.text,
            tokenizer,
            rows=args.rows,
            length=args.length,
            characters=args.characters,
            seed=args.seed,
            folder=work,
        )
        recipes, rows = wanted(args, shown.calibration)
        models = []
        for (name, recipe), row in zip(recipes.items(), rows, strict=True):
            started = time.perf_counter()
            made = neoquant.quantize(args.model, work / name, recipe, calibration=shown.calibration)
            row |= {
                "bits": round(made.plan.bits_per_weight_linears, 4),
                "work_s": round(time.perf_counter() - started, 1),
            }
            models.append(EvaluatedModel(load_dense(made.folder), ModelInfo(name=name)))
            print(name, row, flush=True)
        reference = EvaluatedModel(load_dense(args.model), ModelInfo(name="reference"))
        result = compare(reference, models, tokenizer, shown.suite)
    tokens = sum(unit.tokens for unit in result.reference.units)
    by_name = dict(zip(recipes, result.candidates, strict=True))
    for row in rows:
        kl = [unit.kl for unit in by_name[row["name"]].units]
        row["kl"] = float(f"{sum(kl) / tokens:.6g}")
        row["of_foreseen"] = round(row["kl"] / row["foreseen"], 3)
        if beside := row.get("beside"):
            theirs = [unit.kl for unit in by_name[beside].units]
            row["ratio"] = round(sum(kl) / sum(theirs), 4)
            row["interval"] = interval(kl, theirs)
    found = {
        "what": "mixed precision to order beside uniform grids: KL divergence foreseen and measured",
        "model": {"name": args.model.resolve().name, "sha256": file_sha256(args.model / "model.safetensors")},
        "text": {"name": Path(args.text).name, "characters": args.characters, "scored_tokens": tokens},
        "calibration": shown.calibration.describe() | {"rows_sha256": rows_sha256(shown.calibration)},
        "provenance": provenance(("neoquant", "torch")) | {"source_sha256": source_sha256()},
        "rows": rows,
    }
    args.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    for row in rows:
        print(row)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of an unquantized model")
    parser.add_argument("--text", required=True, help="documents in the Pile's form (.jsonl), or demo")
    parser.add_argument("--json", type=Path, required=True, help="the result")
    parser.add_argument("--targets", type=float, nargs="*", default=[3.0, 3.5, 4.0], help="bits a weight besides")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512, help="tokens of a calibration row")
    parser.add_argument("--characters", type=int, default=4096, help="of each scored document")
    return parser.parse_args()


def wanted(
    args: argparse.Namespace, calibration: Calibration
) -> tuple[dict[str, neoquant.Recipe], list[dict[str, Any]]]:
    """The recipes by name, and what is known of each beforehand."""
    started = time.perf_counter()
    with open_checkpoint(args.model) as checkpoint:
        candidates = foresee(checkpoint, calibration)
    seconds = round(time.perf_counter() - started, 1)
    recipes, rows = {}, []
    budgets: list[tuple[str, int, str | None]] = []
    for grid in UNIFORM:
        name, column = f"uniform-{grid.bits}", candidates.grids.index(grid)
        described = grid.describe()
        options = {key: value for key, value in described.items() if key not in ("name", "bits")}
        recipes[name] = neoquant.Recipe.simple(
            grid.bits, grid.name, format="neoquant", embeddings="keep", **QUANTIZER, **options
        )
        foreseen = float(candidates.losses[:, column].sum())
        rows.append({"name": name, "foreseen": float(f"{foreseen:.6g}")})
        budgets.append((f"mixed-as-{grid.bits}", int(candidates.sizes[:, column].sum()), name))
    budgets += [(f"mixed-{target:g}", int(target * candidates.weights / 8), None) for target in args.targets]
    for name, budget, beside in budgets:
        chosen = allocate(candidates, budget)
        recipes[name] = chosen.recipe().model_copy(update={"embeddings": "keep"})
        layers = {grid.label: chosen.choice.count(number) for number, grid in enumerate(candidates.grids)}
        row = {"name": name, "foreseen": float(f"{chosen.loss:.6g}"), "layers": layers, "foresee_s": seconds}
        rows.append(row | ({} if beside is None else {"beside": beside}))
    return recipes, rows


def interval(kl: list[float], theirs: list[float]) -> list[float] | None:
    import torch

    found = ratio_interval(torch.tensor(kl, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64))
    return None if found is None else [round(end, 4) for end in found]


if __name__ == "__main__":
    main()
