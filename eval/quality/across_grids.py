"""The ratio of two models' KL divergence where they are on different grids, from what `neoquant compare --json` wrote.

    neoquant compare neoquant-demo A B C --suite demo --json compared.json
    python eval/quality/across_grids.py compared.json --json eval/results/NAME.json

The first candidate, or the one that `--of` names, is set beside each of the others. Several files may be given that
compare with the same model on the same documents; of candidates of one name the first counts. A ratio is that of the
mean divergences, with its 95 % interval, documents being the sample, the same ones for both.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from neoquant.evaluation.statistics import ratio_interval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compared", type=Path, nargs="+")
    parser.add_argument("--of", help="[the first]")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    files = [json.loads(path.read_text("utf-8")) for path in args.compared]
    references = [compared["reference"] for compared in files]
    reference, nats = references[0], [[unit["nats"] for unit in each["units"]] for each in references]
    if any(each != nats[0] for each in nats):
        raise SystemExit("the files do not compare with the same model on the same documents")
    by_name = {row["name"]: row for compared in files[::-1] for row in map(row_of, compared["candidates"])}
    rows = sorted(by_name.values(), key=lambda row: row["name"] != args.of)
    result = {
        "what": "several grids: loss beside the unquantized model, and the ratio of the first's KL to the others'",
        "model": {name: reference["model"][name] for name in ("name", "sha256")},
        "suite": reference["suite"],
        "provenance": reference["environment"] | {"date": reference["created"]},
        "ratios": [ratio(rows[0], other) for other in rows[1:]],
        "rows": rows,
    }
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for found in result["ratios"]:
        low, high = found["interval"] or (float("nan"), float("nan"))
        print(f"{found['of']} / {found['to']}: {found['ratio']:.3f} [{low:.3f}, {high:.3f}]")


def row_of(candidate: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a candidate: what it is, and its figures."""
    kept = ("name", "bits_per_weight_linears", "bits_per_weight_model", "bytes_on_disk", "recipe", "calibration")
    return {
        **{name: candidate["evaluation"]["model"][name] for name in kept},
        "evaluation": candidate["evaluation"]["total"],
        "loss": candidate["total"],
        "kl_by_document": [unit["kl"] for unit in candidate["units"]],
    }


def ratio(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    sums = [torch.tensor(each["kl_by_document"], dtype=torch.float64) for each in (mine, theirs)]
    interval = ratio_interval(*sums)
    return {
        "of": mine["name"],
        "to": theirs["name"],
        "ratio": round(float(sums[0].sum() / sums[1].sum()), 4),
        "interval": [round(end, 4) for end in interval] if interval else None,
    }


if __name__ == "__main__":
    main()
