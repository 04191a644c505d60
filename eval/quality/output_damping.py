"""How output-side Hessians from gradients are damped: what GPTQ by the model's loss loses on held-out text, each way.

    python eval/quality/output_damping.py MODEL --text documents.jsonl --json eval/results/output-damping-NAME.json

The package damps by `gptq.GRADIENT_DAMPING` of the mean diagonal. Here the same run is made with other ways in its
place, `--ways` of those in WAYS, on one seed, and scored as feedback.py does, document by document; a ratio is that to
the package's own, with its 95 % interval, documents being the sample. What `--work` has scores of is not made again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from candidates import SHORT, Candidate, Maker, file_sha256, source_sha256
from feedback import Row, dumps, rounded, scores
from provenance import ROOT, provenance
from texts import DEMO_RULE, RULE, texts

from neoquant.calibration.memory import gradient_rows
from neoquant.evaluation.statistics import ratio_interval
from neoquant.loading.pretrained import load_tokenizer
from neoquant.quantizers.hessian import OutputFactor

MODEL: dict[str, Any] = {"objective": "model", "correction": 0.5}
OWN = "mean 0.1"  # the package's way


@dataclass(frozen=True)
class Way:
    """What is added to the diagonal of K[D, D], the mean of g gᵀ over some tokens.

    mean       part of the mean diagonal
    diagonal   part of each entry itself, before that; so all correlations r shrink by one factor
    estimated  where not 0, that part is instead var(r) / r², both meant over all pairs (Schäfer & Strimmer, 2005), with
               `estimated` / tokens for var(r): as if so many tokens held one independent, normal sample
    """

    mean: float
    diagonal: float = 0.0
    estimated: float = 0.0

    def shrunk(self, K: torch.Tensor, tokens: int) -> torch.Tensor:
        """K[heads, D, D] with part of each diagonal entry added to it."""
        K, D = K.clone(), K.shape[1]
        for each in K:
            part = self.diagonal
            if self.estimated:
                scale = each.diagonal().clamp(min=1e-30).rsqrt()
                squares = float((each * scale[:, None] * scale).square().sum() - D) / D  # of one row's correlations
                part = min(1.0, self.estimated * D / tokens / max(squares, 1e-9))
            each.diagonal().mul_(1 + part)
        return K


WAYS = {
    OWN: Way(0.1),
    "mean 0.03": Way(0.03),
    "mean 0.01": Way(0.01),
    "diagonal 0.3": Way(0.01, diagonal=0.3),
    "diagonal 0.1, mean 0.01": Way(0.01, diagonal=0.1),
    "diagonal 0.1": Way(0.001, diagonal=0.1),
    "diagonal 0.03": Way(0.001, diagonal=0.03),
    "estimated": Way(0.001, estimated=77.0),
}


def main() -> None:
    args = parse()
    ways = list(dict.fromkeys([OWN, *args.ways]))
    tokenizer = load_tokenizer(args.model)
    args.work.mkdir(parents=True, exist_ok=True)
    drawn = {"rows": args.rows, "length": args.length, "characters": args.characters, "seed": args.seed}
    shown = texts(args.text, tokenizer, **drawn, folder=args.work)
    kept = args.work / f"scores-{args.model.resolve().name}-{args.seed}.json"
    scored: dict[str, Row] = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    tokens = gradient_rows(args.rows, args.length) * args.length
    made: dict[Candidate, Path] = {}
    for name in [f"{grid}, {way}" for grid in args.grids for way in ways]:
        grid, way = name.split(", ", 1)
        if name not in scored:
            maker = Maker(args.model, args.work / way.replace(" ", "-"), {}, options=MODEL)
            (maker.work / "models").mkdir(parents=True, exist_ok=True)
            with damped(WAYS[way], tokens):
                candidate = Candidate("neoquant", SHORT[grid])
                made[Candidate(name, candidate.grid)], _ = maker.make(candidate, shown.calibration)
    if made:
        for candidate, row in scores(args.model, made, shown, tokenizer).items():
            scored[candidate.tool] = {key: row[key] for key in ("tokens", "kl")}
        kept.write_text(json.dumps(scored), "utf-8")
    result = {
        "what": "GPTQ by the model's loss, output-side Hessians damped in several ways: loss on held-out text",
        "options": MODEL,
        "ways": {way: asdict(WAYS[way]) for way in ways},
        "model": {"name": args.model.resolve().name, "sha256": file_sha256(args.model / "model.safetensors")},
        "text": {
            "name": Path(args.text).name,
            "rule": DEMO_RULE if args.text == "demo" else RULE,
            "characters": args.characters,
        },
        "provenance": provenance(("neoquant", "torch")) | {"source_sha256": source_sha256()},
        "calibration": shown.calibration.describe(),
        "scored": {"sha256": shown.sha256, "documents": shown.names},
        "rows": [row for grid in args.grids for row in figures(scored, grid, ways)],
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
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a calibration row")
    parser.add_argument("--characters", type=int, default=2048, help="of each scored document")
    parser.add_argument("--grids", nargs="+", choices=SHORT, default=["affine3-g64"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="beside the package's own")
    return parser.parse_args()


@contextmanager
def damped(way: Way, tokens: int) -> Iterator[None]:
    """Have output-side Hessians, of gradients at so many tokens, damped in this way."""
    own = OutputFactor.of
    OutputFactor.of = staticmethod(lambda K, damping: own(way.shrunk(K, tokens), way.mean))  # type: ignore[method-assign]
    try:
        yield
    finally:
        OutputFactor.of = staticmethod(own)  # type: ignore[method-assign]


def figures(scored: dict[str, Row], grid: str, ways: list[str]) -> list[Row]:
    """Of each way the mean KL divergence, and its ratio to that of the package's own."""
    rows, sums = [], {way: torch.tensor(scored[f"{grid}, {way}"]["kl"], dtype=torch.float64) for way in ways}
    for way, kl in sums.items():
        tokens, interval = scored[f"{grid}, {way}"]["tokens"], ratio_interval(kl, sums[OWN])
        rows.append(
            {
                "label": Candidate("", SHORT[grid]).label,
                "way": way,
                "kl": rounded(float(kl.sum()) / sum(tokens)),
                "ratio": round(float(kl.sum() / sums[OWN].sum()), 4),
                "interval": [round(end, 4) for end in interval] if interval else None,
                "tokens": tokens,
                "by_document": [rounded(each) for each in kl.tolist()],
            }
        )
    return rows


if __name__ == "__main__":
    main()
