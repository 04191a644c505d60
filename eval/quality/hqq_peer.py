"""HQQ beside the library of that name and round-to-nearest: no calibration, the same bits and groups.

    python eval/quality/hqq_peer.py MODEL --text documents.jsonl --json eval/results/hqq-NAME.json \
        --hqq-python HQQ/bin/python

`--text demo` scores the suite of the bundled model (MODEL: neoquant/demo/neoquant-demo). Each result is multiplied out
to float32 and scored beside the unquantized model on the same windows. The library stores a float16 zero and a float16
scale for each group, and so does neoquant with float zeros; else an integer zero of 8 bits. The bits per weight of each
are given.

With `--draws N`, all of it is done N times, the first time to the model as it is, then with its units in other orders
(reordered.py), which changes nothing but what shares a group. Figures are means over draws. A draw's ratios are given,
too: where they differ much, those of one draw are luck.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from candidates import DRIVERS, file_sha256, load_dense, source_sha256
from feedback import dumps, rounded
from provenance import provenance, versions_in
from reordered import write_reordered

import neoquant
from neoquant.data.suite import Suite, load_suite
from neoquant.evaluation import EvaluatedModel, ModelInfo, compare
from neoquant.evaluation.statistics import ratio_interval
from neoquant.loading.pretrained import load_tokenizer

GRIDS = [(bits, group_size) for bits in (4, 3) for group_size in (64,)]
OURS = {"hqq": {}, "hqq, float zeros": {"float_zero": True}}  # options of the grid
PEERS = ("nearest", "library")
MEASURES = ("kl", "agreement", "nats_per_token")
SCALE_BITS, FLOAT_ZERO_BITS, ZERO_BITS = 16, 16, 8
Row = dict[str, Any]


def main() -> None:
    args = parse()
    suite = load_suite("demo") if args.text == "demo" else Suite.of_file(args.text)
    suite = suite.model_copy(update={"characters": args.characters, "sha256": None})
    draws: list[tuple[list[int], list[Row]]] = []
    for seed in range(args.draws):
        draws.append(draw(args, suite, seed))
        rows = write_result(args, draws)
    for row in rows:
        print(f"{bits_and_tool(row)} KL {1e4 * row['kl']:9.2f}e-4")


def write_result(args: argparse.Namespace, draws: list[tuple[list[int], list[Row]]]) -> list[Row]:
    """What is known after these draws, each its documents' tokens and its rows; the mean rows."""
    tokens, rows = draws[0][0], [mean_row([rows[place] for _, rows in draws]) for place in range(len(draws[0][1]))]
    written = {
        "what": "HQQ of neoquant and of the library hqq, and round-to-nearest: loss beside the unquantized model",
        "model": {"name": args.model.resolve().name, "sha256": file_sha256(args.model / "model.safetensors")},
        "text": {"name": Path(args.text).name, "characters": args.characters, "tokens": tokens},
        "provenance": provenance(("neoquant", "torch")) | {"source_sha256": source_sha256()},
        "peer": versions_in(args.hqq_python, ("hqq", "torch", "transformers")),
        "draws": len(draws),
        "ratios": ratios(rows, [drawn for _, drawn in draws]),
        "rows": rows,
    }
    args.json.write_text(dumps(written), encoding="utf-8")
    return rows


def draw(args: argparse.Namespace, suite: Suite, seed: int) -> tuple[list[int], list[Row]]:
    """Tokens of each document, and what each tool does to the model in the order that `seed` draws."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / "model"
        write_reordered(args.model, model, seed)
        models = [EvaluatedModel(load_dense(model), ModelInfo(name="reference"))]
        for bits, group_size in GRIDS:
            for tool in (*PEERS, *OURS):
                folder = Path(work) / f"{tool}-{bits}-{group_size}".replace(", ", "-").replace(" ", "-")
                make(tool, model, args.hqq_python, folder, bits, group_size)
                zero_bits = FLOAT_ZERO_BITS if tool == "library" or OURS.get(tool) else ZERO_BITS
                stored = bits + (SCALE_BITS + zero_bits) / group_size
                rows.append({"tool": tool, "bits": bits, "group_size": group_size, "bits_per_weight": stored})
                models.append(EvaluatedModel(load_dense(folder), ModelInfo(name=folder.name)))
        result = compare(models[0], models[1:], load_tokenizer(args.model), suite)
    for row, found in zip(rows, result.candidates, strict=True):
        row |= {name: getattr(found.total, name) for name in MEASURES}
        row["unit_kl"] = [unit.kl for unit in found.units]
        print(f"{seed}: {bits_and_tool(row)} KL {1e4 * row['kl']:9.2f}e-4", flush=True)
    return [unit.tokens for unit in result.reference.units], rows


def mean_row(drawn: list[Row]) -> Row:
    """One tool's row, of all draws."""
    found = {name: rounded(statistics.fmean(row[name] for row in drawn)) for name in MEASURES}
    units = zip(*(row["unit_kl"] for row in drawn), strict=True)
    return {**drawn[0], **found, "unit_kl": [rounded(statistics.fmean(unit)) for unit in units]}


def bits_and_tool(row: Row) -> str:
    return f"{row['bits']} bits, groups of {row['group_size']:3}  {row['tool']:16}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of an unquantized model")
    parser.add_argument("--text", required=True, help="documents in the Pile's form (.jsonl), or demo")
    parser.add_argument("--json", type=Path, required=True, help="the result")
    parser.add_argument("--characters", type=int, default=2048, help="of each document")
    parser.add_argument("--draws", type=int, default=1, help="orders of the model's units")
    parser.add_argument("--hqq-python", type=Path, required=True, help="an interpreter that has hqq")
    return parser.parse_args()


def make(tool: str, model: Path, hqq_python: Path, folder: Path, bits: int, group_size: int) -> None:
    """Quantize `model` into `folder`."""
    if tool == "library":
        command = [hqq_python, DRIVERS / "hqq_library.py", model, folder]
        command += ["--bits", bits, "--group-size", group_size]
        subprocess.run([str(part) for part in command], check=True)
        return
    quantizer, options = ("hqq", OURS[tool]) if tool in OURS else (tool, {})
    recipe = neoquant.Recipe.simple(
        bits, "affine", group_size=group_size, quantizer=quantizer, embeddings="keep", **options
    )
    neoquant.quantize(model, folder, recipe)


def ratios(rows: list[Row], draws: list[list[Row]]) -> list[Row]:
    """The mean KL of each of ours as a part of each other tool's on the same grid: its 95 % interval over documents,
    the ratio of each draw, and the ratio of the median document."""
    found = []
    for (bits, group_size), ours, tool in itertools.product(GRIDS, OURS, PEERS):
        mine, theirs = (unit_kl(rows, bits, group_size, name) for name in (ours, tool))
        interval = ratio_interval(mine, theirs)
        pairs = [[unit_kl(drawn, bits, group_size, name).sum() for name in (ours, tool)] for drawn in draws]
        found.append(
            {
                "bits": bits,
                "group_size": group_size,
                "ours": ours,
                "tool": tool,
                "ratio": round(float(mine.sum() / theirs.sum()), 4),
                "interval": [round(end, 4) for end in interval] if interval else None,
                "median_document": round(float((mine / theirs).median()), 4),
                "draws": [round(float(own / other), 4) for own, other in pairs],
            }
        )
    return found


def unit_kl(rows: list[Row], bits: int, group_size: int, tool: str) -> torch.Tensor:
    """KL of each document, float64."""
    (row,) = (row for row in rows if (row["bits"], row["group_size"], row["tool"]) == (bits, group_size, tool))
    return torch.tensor(row["unit_kl"], dtype=torch.float64)


if __name__ == "__main__":
    main()
