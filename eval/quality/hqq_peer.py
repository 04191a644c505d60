"""HQQ beside the library of that name and round-to-nearest: no calibration, the same bits and groups.

    python eval/quality/hqq_peer.py MODEL --text documents.jsonl --json eval/results/hqq-NAME.json \
        --hqq-python HQQ/bin/python

`--text demo` scores the suite of the bundled model (MODEL: neoquant/demo/neoquant-demo). Each result is multiplied out
to float32 and scored beside the unquantized model on the same windows. The library stores a float16 zero and a float16
scale for each group, and so does neoquant with float zeros; else an integer zero of 8 bits. The bits per weight of each
are given.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from candidates import DRIVERS, file_sha256, load_dense, source_sha256
from feedback import dumps, rounded
from provenance import provenance, versions_in

import neoquant
from neoquant.data.suite import Suite, load_suite
from neoquant.evaluation import EvaluatedModel, ModelInfo, compare
from neoquant.evaluation.statistics import ratio_interval
from neoquant.loading.pretrained import load_tokenizer

GRIDS = [(bits, group_size) for bits in (4, 3) for group_size in (64,)]
OURS = {"hqq": {}, "hqq, float zeros": {"float_zero": True}}  # options of the grid
PEERS = ("nearest", "library")
SCALE_BITS, FLOAT_ZERO_BITS, ZERO_BITS = 16, 16, 8
Row = dict[str, Any]


def main() -> None:
    args = parse()
    suite = load_suite("demo") if args.text == "demo" else Suite.of_file(args.text)
    suite = suite.model_copy(update={"characters": args.characters, "sha256": None})
    models = [EvaluatedModel(load_dense(args.model), ModelInfo(name="reference"))]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as work:
        for bits, group_size in GRIDS:
            for tool in (*PEERS, *OURS):
                folder = Path(work) / f"{tool}-{bits}-{group_size}".replace(", ", "-").replace(" ", "-")
                make(tool, args, folder, bits, group_size)
                zero_bits = FLOAT_ZERO_BITS if tool == "library" or OURS.get(tool) else ZERO_BITS
                stored = bits + (SCALE_BITS + zero_bits) / group_size
                rows.append({"tool": tool, "bits": bits, "group_size": group_size, "bits_per_weight": stored})
                models.append(EvaluatedModel(load_dense(folder), ModelInfo(name=folder.name)))
        result = compare(models[0], models[1:], load_tokenizer(args.model), suite)
    tokens = [unit.tokens for unit in result.reference.units]
    for row, found in zip(rows, result.candidates, strict=True):
        row["kl"] = rounded(found.total.kl)
        row["agreement"] = rounded(found.total.agreement)
        row["nats_per_token"] = rounded(found.total.nats_per_token)
        row["unit_kl"] = [rounded(unit.kl) for unit in found.units]
    written = {
        "what": "HQQ of neoquant and of the library hqq, and round-to-nearest: loss beside the unquantized model",
        "model": {"name": args.model.resolve().name, "sha256": file_sha256(args.model / "model.safetensors")},
        "text": {"name": Path(args.text).name, "characters": args.characters, "tokens": tokens},
        "provenance": provenance(("neoquant", "torch")) | {"source_sha256": source_sha256()},
        "peer": versions_in(args.hqq_python, ("hqq", "torch", "transformers")),
        "ratios": ratios(rows),
        "rows": rows,
    }
    args.json.write_text(dumps(written), encoding="utf-8")
    for row in rows:
        print(f"{row['bits']} bits, groups of {row['group_size']:3}  {row['tool']:16} KL {1e4 * row['kl']:9.2f}e-4")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of an unquantized model")
    parser.add_argument("--text", required=True, help="documents in the Pile's form (.jsonl), or demo")
    parser.add_argument("--json", type=Path, required=True, help="the result")
    parser.add_argument("--characters", type=int, default=2048, help="of each document")
    parser.add_argument("--hqq-python", type=Path, required=True, help="an interpreter that has hqq")
    return parser.parse_args()


def make(tool: str, args: argparse.Namespace, folder: Path, bits: int, group_size: int) -> None:
    """Quantize into `folder`."""
    if tool == "library":
        command = [args.hqq_python, DRIVERS / "hqq_library.py", args.model, folder]
        command += ["--bits", bits, "--group-size", group_size]
        subprocess.run([str(part) for part in command], check=True)
        return
    quantizer, options = ("hqq", OURS[tool]) if tool in OURS else (tool, {})
    recipe = neoquant.Recipe.simple(
        bits, "affine", group_size=group_size, quantizer=quantizer, embeddings="keep", **options
    )
    neoquant.quantize(args.model, folder, recipe)


def ratios(rows: list[Row]) -> list[Row]:
    """The mean KL of each of ours as a part of each other tool's on the same grid, with its 95 % interval over
    documents."""
    by_place = {(row["bits"], row["group_size"], row["tool"]): torch.tensor(row["unit_kl"]).double() for row in rows}
    found = []
    for (bits, group_size), ours, tool in itertools.product(GRIDS, OURS, PEERS):
        mine, theirs = by_place[bits, group_size, ours], by_place[bits, group_size, tool]
        interval = ratio_interval(mine, theirs)
        ends = [round(end, 4) for end in interval] if interval else None
        ratio = round(float(mine.sum() / theirs.sum()), 4)
        place = {"bits": bits, "group_size": group_size, "ours": ours, "tool": tool}
        found.append({**place, "ratio": ratio, "interval": ends})
    return found


if __name__ == "__main__":
    main()
