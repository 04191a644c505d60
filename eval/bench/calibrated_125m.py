"""GPTQ, 4 bits in groups of 128, on GPT-Neo's shapes: time and memory of neoquant beside llm-compressor.

    python eval/bench/calibrated_125m.py --llmcompressor-python LLMC/bin/python    # 125M, 32 rows of 512, both in turn
    python eval/bench/calibrated_125m.py --shape 1.3b --rows 16                    # neoquant alone
    python eval/bench/calibrated_125m.py --objectives model --layers 2           # beside by the loss

Random float16 weights of the model's exact shapes and random rows of token ids are written once. Then, `--repeats`
times and in turn, each tool quantizes them in a process of its own. Measured are the seconds of the work and the peak
of resident memory until its end. neoquant's work includes reading the source and writing the result to the disk;
llm-compressor's includes reading the source, and ends with the quantized model in memory.
Without llm-compressor's interpreter the 125M figures are printed, not kept. `--objectives` runs neoquant by these (by
`model` with the correction of 0.5) beside its default, for objectives-SHAPE.json. Seconds of the processor are measured
as well, which other programs on the machine change less.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from quantize_1p3b import SHAPES, VOCABULARY, make_source, peak_rss_mb

sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import ROOT, provenance, versions_in

BITS, GROUP_SIZE = 4, 128
PEER = "llm-compressor"
OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"objective": "model", "correction": 0.5},
    "layer": {"objective": "layer"},
}
DRIVER = ROOT / "eval" / "peers" / "llmcompressor_gptq.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="125m")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--llmcompressor-python", type=Path)
    parser.add_argument("--temp", type=Path, help="where the models are written, and deleted afterwards")
    parser.add_argument("--json", type=Path, help="default: eval/results/calibrated-SHAPE.json")
    parser.add_argument("--objectives", nargs="+", choices=OPTIONS, default=[])
    parser.add_argument("--layers", type=int, help="so many of the shape's, and as much less of its vocabulary [all]")
    parser.add_argument("--child", nargs=4, metavar=("SOURCE", "ROWS", "OUT", "OPTIONS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run_neoquant(*map(Path, args.child[:3]), json.loads(args.child[3]))))
        return
    with tempfile.TemporaryDirectory(prefix="neoquant-bench-", dir=args.temp) as temp:
        result = bench(args, Path(temp))
    kind = "objectives" if args.objectives else "calibrated"
    target = args.json or ROOT / "eval" / "results" / f"{kind}-{args.shape}.json"
    if args.json is None and kind == "calibrated" and args.shape == "125m" and args.llmcompressor_python is None:
        print(f"not kept: {target} has {PEER} beside neoquant (--llmcompressor-python)")
        return
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {target}")


def bench(args: argparse.Namespace, temp: Path) -> dict[str, Any]:
    """Make the source and the rows, measure every tool in turn."""
    import torch

    print(f"making a {args.shape}-shaped checkpoint ...", flush=True)
    source, rows = temp / "source", temp / "rows.pt"
    make_source(args.shape, source, args.layers)
    random = torch.Generator().manual_seed(0)
    tokens = VOCABULARY * (args.layers or SHAPES[args.shape][0]) // SHAPES[args.shape][0]
    torch.save(torch.randint(0, tokens, (args.rows, args.length), generator=random), rows)
    objectives = {"neoquant": {}, **{f"neoquant, {name}": OPTIONS[name] for name in args.objectives}}
    tools = [*objectives, *([PEER] if args.llmcompressor_python else [])]
    runs: dict[str, list[dict[str, float]]] = {tool: [] for tool in tools}
    for repeat in range(args.repeats):
        # The order alternates, so that no tool always runs behind the same neighbour.
        for tool in tools if repeat % 2 == 0 else tools[::-1]:
            out = temp / tool
            if tool == PEER:
                run = peer(args.llmcompressor_python, source, rows, out)
            else:
                run = child(source, rows, out, objectives[tool])
            shutil.rmtree(out)
            runs[tool].append(run)
            print(f"{repeat + 1}/{args.repeats} {tool:15}", describe(run), flush=True)
    median = {tool: {key: statistics.median(run[key] for run in runs[tool]) for key in runs[tool][0]} for tool in tools}
    result: dict[str, Any] = {
        "what": f"GPT-Neo {args.shape} shapes, random float16 weights, GPTQ to {BITS} bits in groups of {GROUP_SIZE}",
        "rows": args.rows,
        "length": args.length,
        "layers": args.layers or SHAPES[args.shape][0],
        "provenance": provenance(("neoquant", "torch")),
        "runs": runs,
        "median": median,
    }
    if args.objectives:
        result["of_the_default"] = {
            tool: {key: round(median[tool][key] / median["neoquant"][key], 3) for key in median[tool]}
            for tool in list(objectives)[1:]
        }
        print("of the default:", result["of_the_default"])
    if PEER in tools:
        result["peer"] = versions_in(args.llmcompressor_python, ("llmcompressor", "torch", "transformers"))
        result["peer_over_neoquant"] = {
            key: round(median[PEER][key] / median["neoquant"][key], 3) for key in median[PEER]
        }
        print("llm-compressor over neoquant:", result["peer_over_neoquant"])
    return result


def child(source: Path, rows: Path, out: Path, options: dict[str, Any]) -> dict[str, float]:
    """neoquant in a fresh process."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, __file__, "--child", str(source), str(rows), str(out), json.dumps(options)]
    return json.loads(finished(command, {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}).splitlines()[-1])


def run_neoquant(source: Path, rows: Path, out: Path, options: dict[str, Any]) -> dict[str, float]:
    import torch

    import neoquant
    from neoquant.calibration.dataset import Calibration

    recipe = neoquant.Recipe.simple(BITS, "affine", group_size=GROUP_SIZE, quantizer="gptq", **options)
    ids = torch.load(rows, weights_only=True)
    started, busy = time.perf_counter(), time.process_time()
    neoquant.quantize(source, out, recipe, calibration=Calibration(ids, "random ids", "", 0))
    work, busy = time.perf_counter() - started, time.process_time() - busy
    return {"work_s": round(work, 2), "processor_s": round(busy, 2), "peak_rss_mb": round(peak_rss_mb(), 1)}


def peer(python: Path, source: Path, rows: Path, out: Path) -> dict[str, float]:
    """llm-compressor in its own environment."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(python), str(DRIVER), str(source), str(rows), str(out)]
    finished([*command, "--bits", str(BITS), "--group-size", str(GROUP_SIZE)], environment)
    record = json.loads((out / "peer.json").read_text("utf-8"))
    return {key: record[key] for key in ("work_s", "peak_rss_mb")}


def finished(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def describe(run: dict[str, float]) -> str:
    return f"{run['work_s']:7.2f} s, {run['peak_rss_mb']:,.0f} MB"


if __name__ == "__main__":
    main()
