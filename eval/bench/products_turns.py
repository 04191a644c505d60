"""The native library's products at two commits in turn: what a change to the kernels has gained.

    git worktree add BEFORE COMMIT && (cd BEFORE && python setup.py build_ext --inplace)
    OMP_NUM_THREADS=2 python eval/bench/products_turns.py BEFORE --json eval/results/products-NAME-turns.json

`. --isas avx2 avxvnni` compares two instruction sets at the same commit.

Each turn is a process of its own that runs products.py of this checkout with the package of one of the two. Times are
the fastest pass of each turn, ratios those of the fastest turns: what others take from the machine only ever adds.
Above 1, this checkout takes less time. torch's product in float32, the same in both, says how much the machine itself
differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import ROOT

PRODUCTS = Path(__file__).with_name("products.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of the other commit, its native library built")
    parser.add_argument("--shape", default="1.3b")
    parser.add_argument("--rows", nargs="+", default=["1", "4"])
    parser.add_argument("--grids", nargs="+", default=["nf4", "affine4", "affine3", "affine2", "int8"])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--isas", nargs=2, metavar="ISA", help="that the two are forced to; default: the best here")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {"before": [], "now": []}
    isas = args.isas or ("", "")
    compared_are = "instruction sets" if args.isas else "commits"
    for turn in range(args.turns):
        for name, checkout, isa in zip(runs, (args.before.resolve(), ROOT), isas, strict=True):
            runs[name].append(run(checkout, isa, args))
            print(f"turn {turn + 1} of {args.turns}, {name}: done", flush=True)
    result = {
        "what": f"the linear layers of a {args.shape} block, two {compared_are} in turn, the fastest pass of each turn",
        "before": runs["before"][-1]["provenance"],
        "now": runs["now"][-1]["provenance"],
        "isas": args.isas,
        "read_gb_per_s": {name: [each["read_gb_per_s"] for each in of] for name, of in runs.items()},
        "rows": {rows: compared(runs, args.shape, rows) for rows in args.rows},
    }
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for rows, contestants in result["rows"].items():
        for name, figures in contestants.items():
            print(f"{rows:>4} rows {name:28} {figures['ratio_of_fastest']}")


def run(checkout: Path, isa: str, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "products.json"
        command = [sys.executable, str(PRODUCTS), "--shape", args.shape, "--rows", *args.rows, "--grids", *args.grids]
        environment = {**os.environ, "PYTHONPATH": str(checkout)} | ({"NEOQUANT_ISA": isa} if isa else {})
        subprocess.run(
            [*command, "--json", str(found)], cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL
        )
        result: dict[str, Any] = json.loads(found.read_text("utf-8"))
    result["provenance"]["commit"] = commit_of(checkout)
    return result


def commit_of(checkout: Path) -> str:
    return subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()


def compared(runs: dict[str, list[dict[str, Any]]], shape: str, rows: str) -> dict[str, Any]:
    found = {}
    for contestant in runs["now"][0]["shapes"][shape][rows]:
        before, now = (
            [each["shapes"][shape][rows][contestant]["fastest_ms"] for each in runs[name]] for name in ("before", "now")
        )
        ratio = round(min(before) / min(now), 3)
        found[contestant] = {"before_ms": before, "now_ms": now, "ratio_of_fastest": ratio}
    return found


if __name__ == "__main__":
    main()
