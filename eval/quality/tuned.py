"""`neoquant tune` on top of GPTQ by the model's loss: what the bundled model loses on held-out text, before and after.

    python eval/quality/tuned.py neoquant/demo/neoquant-demo --json eval/results/tuned-demo.json

For each seed and grid the model is quantized (64 rows of 512 tokens, `--objective model --correction 0.5`), and the
result is tuned on `--rows` of the same kind of text. Both are multiplied out to float32 and scored beside the
unquantized model, document by document, on text of which neither saw anything; a ratio is that of the mean KL
divergences, with its 95 % interval, documents being the sample, the same ones for both. `--start attention` tunes what
GPTQ makes by its default objective. Tuning runs in a process of its own, whose processor seconds and memory are
recorded. What is under --work already is not made a second time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from candidates import FEEDBACK, SHORT, Candidate, Maker, file_sha256, rows_sha256
from feedback import Pooled, Row, dumps, rounded, scores
from provenance import ROOT, provenance
from texts import DEMO_RULE, Texts, texts

from neoquant.loading.pretrained import load_tokenizer
from neoquant.tokenizer.tokenizer import Tokenizer

STARTS: dict[str, dict[str, Any]] = {"model": {"objective": "model", "correction": 0.5}, "attention": {}}
TUNED = "tuned"


def main() -> None:
    args = parse()
    tokenizer = load_tokenizer(args.model)
    grids = tuple(SHORT[name] for name in args.grids)
    maker = Maker(args.model, args.work, {}, (), (), grids, STARTS[args.start])
    seeds = []
    for seed in args.seeds:
        (args.work / "scores").mkdir(parents=True, exist_ok=True)
        shown = texts("demo", tokenizer, rows=64, length=512, characters=args.characters, seed=seed, folder=args.work)
        seeds.append(score_seed(args, maker, shown, tokenizer))
        args.json.write_text(dumps(summarize(args, maker, seeds)), encoding="utf-8")
    for row in json.loads(args.json.read_text("utf-8"))["rows"]:
        print(
            f"{row['label']:34} KL {1e4 * row['before']['kl']:8.3f}e-4 -> {1e4 * row['after']['kl']:8.3f}e-4", end=" "
        )
        print(f"{row['ratio']['ratio']:.3f} {row['ratio']['interval']}, {row['processor_s']} s, {row['memory_mb']} MB")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the bundled model")
    parser.add_argument("--json", type=Path, required=True, help="the result")
    parser.add_argument("--work", type=Path, default=ROOT / ".feedback", help="what is made on the way [.feedback]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--start", choices=STARTS, default="model", help="the objective that is tuned on top of")
    parser.add_argument("--grids", nargs="+", choices=SHORT, default=["affine3-g64", "affine2-g32", "nf4"])
    parser.add_argument("--characters", type=int, default=4096, help="of each scored document")
    parser.add_argument("--rows", type=int, default=256, help="samples to tune on")
    parser.add_argument("--options", nargs="*", default=[], metavar="WORD", help="of neoquant tune, without its dashes")
    return parser.parse_args()


def score_seed(args: argparse.Namespace, maker: Maker, shown: Texts, tokenizer: Tokenizer) -> Row:
    """Make and score what has no score yet, in one pass over the text; then all that is known of this seed."""
    found: dict[Candidate, dict[str, Any]] = {}
    waiting: dict[Candidate, tuple[Path, Path]] = {}
    for grid in maker.grids:
        start = Candidate(FEEDBACK, grid)
        folder, _ = maker.make(start, shown.calibration)
        tuned, record = tune(args, maker, folder, shown.calibration.seed)
        path = args.work / "scores" / f"{tuned.name}-{shown.sha256[:16]}.json"
        if not path.exists():
            waiting |= {start: (folder, path), Candidate(TUNED, grid): (tuned, path)}
        found[start] = {"record": record, "path": path}
    if waiting:
        models = {candidate: folder for candidate, (folder, _) in waiting.items()}
        scored = scores(maker.model, models, shown, tokenizer)
        for start in [candidate for candidate in waiting if candidate.tool == FEEDBACK]:
            pair = {"before": scored[start], "after": scored[Candidate(TUNED, start.grid)]}
            waiting[start][1].write_text(json.dumps(pair), "utf-8")
    pairs = {start: json.loads(each["path"].read_text("utf-8")) for start, each in found.items()}
    first = next(iter(pairs.values()))["before"]
    rows = {}
    for start, pair in pairs.items():
        rows[start], rows[Candidate(TUNED, start.grid)] = pair["before"], pair["after"]
    return {
        "calibration": shown.calibration.describe() | {"rows_sha256": rows_sha256(shown.calibration)},
        "scored": {
            "sha256": shown.sha256,
            "documents": shown.names,
            "tokens": first["tokens"],
            "reference_nats": first["reference_nats"],
        },
        "rows": rows,
        "tuning": {start: each["record"] for start, each in found.items()},
    }


def tune(args: argparse.Namespace, maker: Maker, folder: Path, seed: int) -> tuple[Path, dict[str, Any]]:
    """The tuned folder, and what `--json` says of it."""
    words = [word if index % 2 else f"--{word}" for index, word in enumerate(args.options)]
    asked = ["--rows", str(args.rows), "--length", "512", "--seed", str(100 + seed), *words]
    made = folder.with_name("-".join([folder.name, TUNED, *(word.lstrip("-") for word in asked[::2] + asked[1::2])]))
    record = made.with_suffix(".tuned.json")
    if not record.exists():
        shutil.rmtree(made, ignore_errors=True)
        print(f"seed {seed}: tuning {folder.name}", flush=True)
        command = [sys.executable, "-m", "neoquant", "tune", str(folder), "--base", str(maker.model)]
        command += ["--calibration", "demo", *asked, "--out", str(made), "--json", str(record), "--quiet"]
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        before = processor_seconds()
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        took = {"processor_s": round(processor_seconds() - before, 1)}  # other programs change it less than the time
        record.write_text(json.dumps(json.loads(record.read_text("utf-8")) | took), "utf-8")
    return made, json.loads(record.read_text("utf-8")) | {"sha256": file_sha256(made / "model.safetensors")}


def processor_seconds() -> float:
    """Of all processes that were started from here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def summarize(args: argparse.Namespace, maker: Maker, seeds: list[Row]) -> Row:
    rows = []
    for grid in maker.grids:
        start = Candidate(FEEDBACK, grid)
        before, after = Pooled(seeds, start), Pooled(seeds, Candidate(TUNED, grid))
        runs = [seed["tuning"][start] for seed in seeds]
        rows.append(
            {
                "label": start.label,
                "grid": grid.describe(),
                "before": before.figures(),
                "after": after.figures(),
                "ratio": after.ratio(before),
                "loss_on_samples": [{key: rounded(run["loss"][key]) for key in ("before", "after")} for run in runs],
                "processor_s": [run.get("processor_s") for run in runs],
                "memory_mb": round(max(run["peak_rss_bytes"] for run in runs) / 1e6, 1),
                "runs": [{key: run[key] for key in ("trained", "steps", "learning_rate", "curve")} for run in runs],
            }
        )
    return {
        "what": "neoquant tune on top of GPTQ: KL divergence on text of which neither saw anything, before and after",
        "start": STARTS[args.start] or {"objective": "attention"},
        "options": {"rows": args.rows, "length": 512, "words": args.options},
        "model": {"name": args.model.resolve().name, "sha256": maker.model_sha256},
        "text": {"name": "demo", "rule": DEMO_RULE, "characters": args.characters},
        "provenance": provenance(("neoquant", "torch")) | {"threads": torch.get_num_threads()},
        "seeds": [{key: seed[key] for key in ("calibration", "scored")} for seed in seeds],
        "rows": rows,
    }


if __name__ == "__main__":
    main()
