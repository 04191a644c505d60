"""Error feedback beside its peers: what each tool's GPTQ loses on held-out text, on the same calibration rows.

    python eval/quality/feedback.py MODEL --text documents.jsonl --json eval/results/feedback-NAME.json \
        --llmcompressor-python LLMC/bin/python --gptqmodel-python GPTQMODEL/bin/python

Makes the figures again; what is under --work already is not made a second time, so that after a change of neoquant
only its own rows are, and a run that was stopped goes on. `--text demo` calibrates and scores on the bundled model's
own kind of text (MODEL: neoquant/demo/neoquant-demo, --length 512).

For each seed some documents are calibrated on and others scored (texts.py has the rule); every tool sees the same rows
of token ids. Each result is multiplied out to float32 and scored beside the unquantized model, document by document:
KL divergence, agreement of the likeliest token, change of the loss. A ratio of two tools is that of their mean
divergences, with its 95 % interval, documents being the sample, the same ones for both.

A peer without an interpreter is left out, and that is said. `--gptaq`, `--autoround-steps` and `--hqq-python` add
peers that are not GPTQ; of them HQQ alone is not calibrated. `--objectives` adds GPTQ as neoquant does it by another
objective than its default, `--options` makes neoquant's own by others, and `--grids` takes some of the grids only.
After a change to a driver in eval/peers, delete --work.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from candidates import (
    DESC_ACT,
    FEEDBACK,
    GPTAQ,
    HQQ,
    OBJECTIVES,
    PEERS,
    SHORT,
    Candidate,
    Maker,
    Peer,
    autoround,
    load_dense,
    rows_sha256,
)
from provenance import ROOT, provenance
from texts import DEMO_RULE, RULE, Texts, texts

from neoquant.evaluation import EvaluatedModel, ModelInfo, compare
from neoquant.evaluation.statistics import ratio_interval
from neoquant.loading.pretrained import load_tokenizer
from neoquant.quantizers import Gptq, parse_option
from neoquant.tokenizer.tokenizer import Tokenizer

Row = dict[str, Any]


def main() -> None:
    args = parse()
    tokenizer = load_tokenizer(args.model)
    peers = asked_peers(args)
    given = {package: python for package, python in interpreters(args).items() if python}
    for package in dict.fromkeys(peer.package for peer in peers if peer.package not in given):
        print(f"{package} is left out: no --{package.replace('-', '')}-python")
    grids = tuple(SHORT[name] for name in args.grids)
    options = {key: parse_option(Gptq.name, key, value) for key, value in (each.split("=", 1) for each in args.options)}
    maker = Maker(args.model, args.work, given, peers, tuple(args.objectives), grids, options)
    scored = []
    for seed in args.seeds:
        folder = args.work / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        shown = texts(
            args.text,
            tokenizer,
            rows=args.rows,
            length=args.length,
            characters=args.characters,
            seed=seed,
            folder=folder,
        )
        scored.append(score_seed(maker, shown, tokenizer))
        result = summarize(args, maker, scored)
        args.json.write_text(dumps(result), encoding="utf-8")
        print(f"seeds {args.seeds[: len(scored)]} -> {args.json}", flush=True)
    print_ratios(result)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of an unquantized model")
    parser.add_argument("--text", required=True, help="documents in the Pile's form (.jsonl), or demo")
    parser.add_argument("--json", type=Path, required=True, help="the result")
    parser.add_argument("--work", type=Path, default=ROOT / ".feedback", help="what is made on the way [.feedback]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a calibration row")
    parser.add_argument("--characters", type=int, default=2048, help="of each scored document")
    parser.add_argument("--llmcompressor-python", type=Path)
    parser.add_argument("--gptqmodel-python", type=Path)
    parser.add_argument("--autoround-python", type=Path)
    parser.add_argument("--hqq-python", type=Path)
    parser.add_argument("--gptaq", action="store_true", help="also GPTQModel's GPTAQ")
    parser.add_argument("--autoround-steps", type=int, nargs="*", default=[], help="also AutoRound, in so many steps")
    parser.add_argument("--desc-act", action="store_true", help="GPTQModel also with its other activation order")
    parser.add_argument("--objectives", nargs="*", choices=OBJECTIVES, default=[], help="GPTQ's others beside its own")
    parser.add_argument("--options", nargs="*", metavar="NAME=VALUE", default=[], help="GPTQ's that ours is made with")
    parser.add_argument("--grids", nargs="+", choices=SHORT, default=list(SHORT), help="[all]")
    return parser.parse_args()


def interpreters(args: argparse.Namespace) -> dict[str, Path | None]:
    """By a peer's package."""
    return {
        "llmcompressor": args.llmcompressor_python,
        "gptqmodel": args.gptqmodel_python,
        "auto-round": args.autoround_python,
        "hqq": args.hqq_python,
    }


def asked_peers(args: argparse.Namespace) -> tuple[Peer, ...]:
    """Those that always take part, and those that the options add."""
    added = [*([DESC_ACT] if args.desc_act else []), *([GPTAQ] if args.gptaq else [])]
    added += [*map(autoround, args.autoround_steps), *([HQQ] if args.hqq_python else [])]
    return (*PEERS, *added)


def score_seed(maker: Maker, shown: Texts, tokenizer: Tokenizer) -> Row:
    """Make and score, in one pass over the text, what has no score yet; then all that is known of this seed."""
    folder = maker.work / "scores"
    folder.mkdir(exist_ok=True)
    paths = {
        candidate: folder / f"{maker.key(candidate, shown.calibration)}-{shown.sha256[:16]}.json"
        for candidate in maker.candidates()
    }
    made = {}
    for candidate in [candidate for candidate, path in paths.items() if not path.exists()]:
        print(f"seed {shown.calibration.seed}: {candidate.tool}, {candidate.label}", flush=True)
        made[candidate] = maker.make(candidate, shown.calibration)
    if made:
        models = {candidate: model for candidate, (model, _) in made.items()}
        for candidate, sums in scores(maker.model, models, shown, tokenizer).items():
            paths[candidate].write_text(json.dumps(made[candidate][1] | sums), "utf-8")
    rows = {candidate: json.loads(path.read_text("utf-8")) for candidate, path in paths.items()}
    common = [{key: row.pop(key) for key in ("tokens", "reference_nats")} for row in rows.values()]
    return {
        "calibration": shown.calibration.describe() | {"rows_sha256": rows_sha256(shown.calibration)},
        "scored": {"sha256": shown.sha256, "documents": shown.names, **common[0]},
        "rows": rows,
    }


def scores(reference: Path, models: dict[Candidate, Path], shown: Texts, tokenizer: Tokenizer) -> dict[Candidate, Row]:
    """Sums over each document's tokens, for every model."""
    evaluated = [EvaluatedModel(load_dense(path), ModelInfo(name=path.name)) for path in (reference, *models.values())]
    result = compare(evaluated[0], evaluated[1:], tokenizer, shown.suite)
    units = result.reference.units
    return {
        candidate: {
            "tokens": [unit.tokens for unit in units],
            "reference_nats": [rounded(unit.nats) for unit in units],
            "nats": [rounded(unit.nats) for unit in found.evaluation.units],
            "kl": [rounded(unit.kl) for unit in found.units],
            "agreed": [unit.agreed for unit in found.units],
        }
        for candidate, found in zip(models, result.candidates, strict=True)
    }


def summarize(args: argparse.Namespace, maker: Maker, seeds: list[Row]) -> Row:
    """The result: for each candidate its figures over all seeds, for each peer the ratio of ours to it."""
    pooled = {candidate: Pooled(seeds, candidate) for candidate in maker.candidates()}
    rows, ratios = [], []
    for candidate, sums in pooled.items():
        rows.append(
            {
                "grid": candidate.grid.describe(),
                "label": candidate.label,
                "tool": candidate.tool,
                **sums.figures(),
                "seeds": [seed["rows"][candidate] for seed in seeds],
            }
        )
        if candidate.tool != FEEDBACK:
            ours = pooled[Candidate(FEEDBACK, candidate.grid)]
            ratios.append({"label": candidate.label, "peer": candidate.tool, **ours.ratio(sums)})
    return {
        "what": "GPTQ of several tools on the same calibration rows: loss on text that was not calibrated on",
        "options": {
            FEEDBACK: {name: Gptq(**maker.options).describe()[name] for name in ("objective", "correction")},
            **{name: OBJECTIVES[name] for name in args.objectives},
        },
        "model": {"name": args.model.resolve().name, "sha256": maker.model_sha256},
        "text": {
            "name": Path(args.text).name,
            "rule": DEMO_RULE if args.text == "demo" else RULE,
            "characters": args.characters,
        },
        "provenance": provenance(("neoquant", "torch")) | {"source_sha256": maker.source_sha256},
        "peers": maker.versions
        | {peer.package: "left out" for peer in asked_peers(args) if peer.package not in maker.versions},
        "seeds": [{key: seed[key] for key in ("calibration", "scored")} for seed in seeds],
        "ratios": ratios,
        "rows": rows,
    }


class Pooled:
    """A candidate's sums by document, over all seeds: a document that several seeds score is one unit."""

    def __init__(self, seeds: list[Row], candidate: Candidate) -> None:
        self.by_seed: list[dict[str, torch.Tensor]] = []
        units: dict[str, dict[str, float]] = {}
        for seed in seeds:
            row, scored = seed["rows"][candidate], seed["scored"]
            change = [a - b for a, b in zip(row["nats"], scored["reference_nats"], strict=True)]
            sums = {"tokens": scored["tokens"], "kl": row["kl"], "agreed": row["agreed"], "change": change}
            self.by_seed.append({name: torch.tensor(values, dtype=torch.float64) for name, values in sums.items()})
            for number, document in enumerate(scored["documents"]):
                unit = units.setdefault(document, dict.fromkeys(sums, 0.0))
                for name, values in sums.items():
                    unit[name] += values[number]
        self.sums = {
            name: torch.tensor([unit[name] for unit in units.values()], dtype=torch.float64)
            for name in ("tokens", "kl", "agreed", "change")
        }

    def mean(self, name: str) -> float:
        return float(self.sums[name].sum() / self.sums["tokens"].sum())

    def figures(self) -> Row:
        """Per token: mean KL (also of each seed), agreement, change of the loss with its interval."""
        change = ratio_interval(self.sums["change"], self.sums["tokens"])
        return {
            "kl": rounded(self.mean("kl")),
            "kl_by_seed": [rounded(float(sums["kl"].sum() / sums["tokens"].sum())) for sums in self.by_seed],
            "agreement": rounded(self.mean("agreed")),
            "nats_per_token": rounded(self.mean("change")),
            "nats_interval": [rounded(end) for end in change] if change else None,
        }

    def ratio(self, other: Pooled) -> Row:
        """Of the mean KL to `other`'s, with its interval, over all seeds and in each."""
        pairs = [(self.sums, other.sums), *zip(self.by_seed, other.by_seed, strict=True)]
        found = []
        for mine, theirs in pairs:
            interval = ratio_interval(mine["kl"], theirs["kl"])
            ends = [round(end, 4) for end in interval] if interval else None
            found.append({"ratio": round(float(mine["kl"].sum() / theirs["kl"].sum()), 4), "interval": ends})
        return {**found[0], "by_seed": found[1:]}


def rounded(value: float) -> float:
    """Seven digits: more than float32 logits give."""
    return float(f"{value:.7g}")


def dumps(result: Row) -> str:
    """JSON with a list of numbers or names on one line."""
    text = json.dumps(result, indent=1, ensure_ascii=False)
    return re.sub(r"\[\s+([^\[\]{}]+?)\s+\]", lambda found: f"[{re.sub(chr(10) + ' *', ' ', found[1])}]", text) + "\n"


def print_ratios(result: Row) -> None:
    for row in result["rows"]:
        print(f"{row['label']:34} {row['tool']:20} KL {1e4 * row['kl']:8.3f}e-4  top-1 {100 * row['agreement']:.2f} %")
    for row in result["ratios"]:
        low, high = row["interval"] or (float("nan"), float("nan"))
        print(f"{row['label']:34} neoquant / {row['peer']:20} {row['ratio']:.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
