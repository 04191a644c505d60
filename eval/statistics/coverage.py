"""How often the 95 % intervals hold the truth, on simulated documents: writes eval/results/coverage.json.

    python eval/statistics/coverage.py

Documents differ in length as the Pile's do (log-normal, by a factor of 2 or e), and in what a model loses on them:

    mean        the loss differs from document to document, normally
    tokens      it is the same everywhere, and tokens add noise: a long document is known better
    both        both of these
    skewed      log-normal: a few documents lose much more than the rest
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from neoquant.evaluation.statistics import mean_interval, ratio_interval

RESULT = Path(__file__).parents[1] / "results" / "coverage.json"
DRAWS = 4000
DOCUMENTS = (5, 7, 10, 15, 20, 50, 100, 200)
LENGTHS = {"equal lengths": 0.0, "lengths by a factor of 2": math.log(2), "lengths by a factor of e": 1.0}
TRUTH = 0.02  # nats a token


def draw(loss: str, lengths: float, documents: int, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(change of nats, tokens) of documents: float64[documents] each."""

    def normal() -> torch.Tensor:
        return torch.randn(documents, generator=random, dtype=torch.float64)

    tokens = torch.exp(6 + lengths * normal())
    if loss == "skewed":
        return TRUTH * torch.exp(0.7 * normal() - 0.7**2 / 2) * tokens, tokens
    of_documents = TRUTH / 2 * normal() if loss in ("mean", "both") else 0.0
    of_tokens = 0.3 / tokens.sqrt() * normal() if loss in ("tokens", "both") else 0.0
    return (TRUTH + of_documents + of_tokens) * tokens, tokens


def coverage(loss: str, lengths: float, documents: int, subsets: int = 1) -> float:
    """The share of intervals that hold TRUTH, of the mean over `subsets` of as many documents each."""
    random = torch.Generator().manual_seed(documents)
    held = 0
    for _ in range(DRAWS):
        parts = [draw(loss, lengths, documents, random) for _ in range(subsets)]
        interval = mean_interval(parts) if subsets > 1 else ratio_interval(*parts[0])
        assert interval is not None
        held += interval.low <= TRUTH <= interval.high
    return held / DRAWS


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for loss in ("mean", "tokens", "both", "skewed"):
        for name, lengths in LENGTHS.items():
            found = {str(n): coverage(loss, lengths, n) for n in DOCUMENTS}
            rows.append({"change": loss, "lengths": name, "coverage": found})
            print(
                f"{loss:8} {name:26} " + "  ".join(f"{n} {100 * share:.1f}" for n, share in found.items()), flush=True
            )
    macro = {
        f"{loss}, 22 subsets of {n}": coverage(loss, math.log(2), n, subsets=22)
        for loss in ("both", "skewed")
        for n in (2, 10)
    }
    for name, share in macro.items():
        print(f"macro: {name}: {100 * share:.1f}")
    RESULT.write_text(json.dumps({"draws": DRAWS, "total": rows, "macro": macro}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
