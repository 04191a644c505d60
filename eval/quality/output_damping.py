"""How output-side Hessians from gradients are damped: what GPTQ by the model's loss loses on held-out text, each way.

    python eval/quality/output_damping.py MODEL --text documents.jsonl --json eval/results/output-damping-NAME.json

The package shrinks correlations as cross-validation between two halves of the samples says
(`calibration.loss_hessian.shrunk`). Here the same run is made with other ways in its place, `--ways` of those in WAYS,
and scored as feedback.py does, document by document; a ratio is that to BASE over all `--seeds`, with its 95 %
interval, documents being the sample. The walk through the unquantized model and back is made once for each seed, and
every way takes the Hessians that it left. What `--work` has scores of is not made again; rows say by which source.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from candidates import SHORT, Candidate, Maker, file_sha256, source_sha256
from feedback import Pooled, Row, dumps, scores
from provenance import ROOT, provenance
from texts import DEMO_RULE, RULE, Texts, texts
from torch import Tensor

from neoquant.loading.pretrained import load_tokenizer
from neoquant.quantization import calibrated, reverse
from neoquant.quantization.resume import ResumableRun
from neoquant.quantizers import Gptq
from neoquant.tokenizer.tokenizer import Tokenizer

MODEL: dict[str, Any] = {"objective": "model", "correction": 0.5}
BASE = "mean 0.1"


@dataclass(frozen=True)
class Way:
    """What is added to the diagonal of K[D, D], the mean of g gᵀ over some tokens.

    mean       part of the mean diagonal
    diagonal   part of each entry itself, before that; so all correlations shrink by one factor
    """

    mean: float
    diagonal: float = 0.0

    def shrunk(self, first: Tensor, second: Tensor, weight: float) -> Tensor:
        """K[heads, D, D] of two halves, of which the first has the part `weight` of the samples, with part of each
        diagonal entry added to it."""
        K = weight * first + (1 - weight) * second
        K.diagonal(dim1=1, dim2=2).mul_(1 + self.diagonal)
        return K


WAYS: dict[str, Way | None] = {
    BASE: Way(0.1),
    "mean 0.03": Way(0.03),
    "mean 0.01": Way(0.01),
    "mean 0.001": Way(0.001),
    "diagonal 0.3": Way(0.01, diagonal=0.3),
    "diagonal 0.1, mean 0.01": Way(0.01, diagonal=0.1),
    "diagonal 0.1": Way(0.001, diagonal=0.1),
    "diagonal 0.03": Way(0.001, diagonal=0.03),
    "cross-validated": None,  # the package's way
}


def main() -> None:
    args = parse()
    ways = list(dict.fromkeys([BASE, *args.ways]))
    tokenizer = load_tokenizer(args.model)
    seeds = []
    for seed in args.seeds:
        work = args.work / f"{args.model.resolve().name}-{seed}"
        work.mkdir(parents=True, exist_ok=True)
        drawn = {"rows": args.rows, "length": args.length, "characters": args.characters, "seed": seed}
        shown = texts(args.text, tokenizer, **drawn, folder=work)
        seeds.append(
            score_seed(args.model, [(grid, way) for grid in args.grids for way in ways], work, shown, tokenizer)
        )
        result = {
            "what": "GPTQ by the model's loss, output-side Hessians damped in several ways: loss on held-out text",
            "options": MODEL,
            "ways": {way: asdict(found) if (found := WAYS[way]) else "the package's" for way in ways},
            "model": {"name": args.model.resolve().name, "sha256": file_sha256(args.model / "model.safetensors")},
            "text": {
                "name": Path(args.text).name,
                "rule": DEMO_RULE if args.text == "demo" else RULE,
                "characters": args.characters,
            },
            "provenance": provenance(("neoquant", "torch")) | {"source_sha256": source_sha256()},
            "seeds": [{key: each[key] for key in ("calibration", "scored")} for each in seeds],
            "rows": [row for grid in args.grids for row in figures(seeds, grid, ways)],
        }
        args.json.write_text(dumps(result), encoding="utf-8")
        for row in result["rows"]:
            print(f"{row['label']:34} {row['way']:24} KL {1e4 * row['kl']:8.4f}e-4  {row['ratio']} {row['interval']}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of an unquantized model")
    parser.add_argument("--text", required=True, help="documents in the Pile's form (.jsonl), or demo")
    parser.add_argument("--json", type=Path, required=True, help="the result")
    parser.add_argument("--work", type=Path, default=ROOT / ".feedback" / "damping", help="what is made on the way")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a calibration row")
    parser.add_argument("--characters", type=int, default=2048, help="of each scored document")
    parser.add_argument("--grids", nargs="+", choices=SHORT, default=["affine3-g64", "nf4"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help=f"beside {BASE}")
    return parser.parse_args()


def score_seed(
    model: Path, asked: list[tuple[str, str]], work: Path, shown: Texts, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Of each grid and way the sums over each document's tokens; what has no score yet is made."""
    kept = work / "scores.json"
    scored: dict[str, Row] = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    made: dict[Candidate, Path] = {}
    for grid, way in asked:
        if f"{grid}, {way}" not in scored:
            maker = Maker(model, work / way.replace(" ", "-"), {}, options=MODEL)
            (maker.work / "models").mkdir(parents=True, exist_ok=True)
            with damped(WAYS[way]), walked_once(work / "walk"):
                candidate = Candidate("neoquant", SHORT[grid])
                made[Candidate(f"{grid}, {way}", candidate.grid)], _ = maker.make(candidate, shown.calibration)
            print(f"seed {shown.calibration.seed}: {grid}, {way}", flush=True)
    if made:
        for candidate, row in scores(model, made, shown, tokenizer).items():
            scored[candidate.tool] = row | {"source_sha256": source_sha256()}
        kept.write_text(json.dumps(scored), "utf-8")
    first = next(iter(scored.values()))
    return {
        "calibration": shown.calibration.describe(),
        "scored": {"sha256": shown.sha256, "documents": shown.names}
        | {key: first[key] for key in ("tokens", "reference_nats")},
        "rows": {Candidate(name, SHORT[name.split(", ", 1)[0]]): row for name, row in scored.items()},
    }


@contextmanager
def damped(way: Way | None) -> Iterator[None]:
    """Have output-side Hessians from gradients damped in this way."""
    with ExitStack() as stack:
        if way is not None:
            stack.enter_context(mock.patch.object(reverse, "shrunk", way.shrunk))
            stack.enter_context(mock.patch.object(Gptq, "_output_damping", mock.Mock(return_value=way.mean)))
        yield


@contextmanager
def walked_once(folder: Path) -> Iterator[None]:
    """Have the walk through the unquantized model leave its files in `folder` too, or take those that are there."""
    walk, kept = calibrated.look_at_unquantized, re.compile(r"(input|behind|curvature)-.*")

    def linked(source: Path, target: Path) -> None:
        for path in source.iterdir():
            if kept.fullmatch(path.name):
                os.link(path, target / path.name)

    def look(checkpoint: Any, plan: Any, calibration: Any, memory: Any, run: ResumableRun, progress: Any) -> None:
        if folder.exists():
            linked(folder, run.folder)
            return
        walk(checkpoint, plan, calibration, memory, run, progress)
        part = folder.with_suffix(".part")
        part.mkdir()
        linked(run.folder, part)
        part.rename(folder)

    with mock.patch.object(calibrated, "look_at_unquantized", look):
        yield


def figures(seeds: list[dict[str, Any]], grid: str, ways: list[str]) -> list[Row]:
    """Of each way the mean KL divergence, and its ratio to that of BASE."""
    rows = []
    pooled = {way: Pooled(seeds, Candidate(f"{grid}, {way}", SHORT[grid])) for way in ways}
    for way, sums in pooled.items():
        figures = sums.figures()
        rows.append(
            {
                "label": Candidate("", SHORT[grid]).label,
                "way": way,
                "kl": figures["kl"],
                "kl_by_seed": figures["kl_by_seed"],
                **sums.ratio(pooled[BASE]),
                "source_sha256": [
                    seed["rows"][Candidate(f"{grid}, {way}", SHORT[grid])].get("source_sha256") for seed in seeds
                ],
                "by_document": [seed["rows"][Candidate(f"{grid}, {way}", SHORT[grid])]["kl"] for seed in seeds],
            }
        )
    return rows


if __name__ == "__main__":
    main()
