"""One candidate's section of a page: charts, figures by subset, and the passages that it reads most differently."""

from __future__ import annotations

from typing import Any, NamedTuple

from neoquant.evaluation.result import Candidate, Change, Comparison, Distribution, WorstToken
from neoquant.report import charts
from neoquant.report.formatting import agreement, change_interval, divergence, perplexity
from neoquant.report.parts import Chart, chart, unbroken, visible
from neoquant.report.verdict import percent_change, percent_interval

PASSAGES = 8  # shown of each candidate
SHADED = 0.15  # nats: a token that changed by less has no ground
DEEPEST = 3.0  # nats: a change of this or more has the deepest
_QUANTILES = ("1", "5", "25", "50", "75", "95", "99", "99.9")


class Token(NamedTuple):
    text: str
    kind: str = ""  # classes: up, down, here
    shade: str = ""
    title: str = ""


def candidate_part(result: Comparison, candidate: Candidate, short: str, *, opened: bool) -> dict[str, Any]:
    """What the template shows of `candidate`, called `short` in passages; `opened` from the start or not."""
    key = f"c{result.candidates.index(candidate)}"
    changes = [*candidate.subsets, candidate.total]
    scores = [*candidate.evaluation.subsets, candidate.evaluation.total]
    befores = [*result.reference.subsets, result.reference.total]
    return {
        "name": candidate.evaluation.model.name,
        "headline": unbroken(_headline(candidate)),
        "open": opened,
        "charts": _charts(candidate, key),
        "quantiles": ["mean", "RMS", "least", *(f"{q} %" for q in _QUANTILES), "most"],
        "distributions": _distribution_rows(candidate.total),
        "subsets": [
            {
                "name": score.subset,
                "total": score is scores[-1],
                "tokens": f"{score.tokens:,}",
                "perplexity": f"{perplexity(before)} → {perplexity(score)}",
                "bits_per_byte": f"{before.bits_per_byte:.4f} → {score.bits_per_byte:.4f}",
                "change": change_interval(change),
                "kl": divergence(change.kl),
                "agreement": agreement(change),
            }
            for before, score, change in zip(befores, scores, changes, strict=True)
        ],
        "documents": [
            {
                "name": f"{document.subset}, {document.unit}: {_start(document.beginning)}",
                "tokens": f"{document.tokens:,}",
                "change": f"{document.nats_per_token:+.4f}",
                "kl": divergence(document.kl),
            }
            for document in candidate.worst_documents[:5]
        ],
        "passages": [
            _passage(token, result.reference.model.name, short) for token in candidate.worst_tokens[:PASSAGES]
        ],
    }


def _charts(candidate: Candidate, key: str) -> list[Chart]:
    made = []
    rows = [charts.Interval.of_change(visible(change.subset), change, False) for change in candidate.subsets]
    rows.append(charts.Interval.of_change("total", candidate.total, True))
    title = "Change of perplexity by subset"
    svg = charts.interval_chart(
        rows, f"{key}-subsets", f"{title}: {candidate.evaluation.model.name}", "change of perplexity, %"
    )
    made.append(chart(title, "In per cent, with 95 % intervals.", svg))
    for what, title, label, spread in (
        (
            "loss",
            "Change of single tokens’ loss",
            "−log p(token) above the reference’s, nats",
            candidate.total.loss_change,
        ),
        ("kl", "Divergence of single tokens", "KL divergence, nats", candidate.total.divergence),
    ):
        if spread is None or spread.histogram is None or not sum(spread.histogram.counts):
            continue
        histogram = spread.histogram
        outside = [
            f"{count:,} lie further {side}"
            for count, side in ((histogram.below, "left"), (histogram.above, "right"))
            if count
        ]
        note = (
            f"Right of zero: less likely than before.{' ' + ', '.join(outside) + '.' if outside else ''}"
            if what == "loss"
            else "Both axes are logarithmic."
        )
        svg = charts.histogram_chart(
            histogram.edges,
            histogram.counts,
            f"{key}-{what}",
            f"{title}: {candidate.evaluation.model.name}",
            label,
        )
        made.append(chart(title, note, svg))
    return made


def _passage(token: WorstToken, reference: str, candidate: str) -> dict[str, Any]:
    says = (
        f"{_quoted(token.token)}: {_probability(token.probability_reference)} in {reference}, "
        f"{_probability(token.probability)} in "
        f"{candidate}. Likeliest was {_quoted(token.top_reference.text)} "
        f"({_probability(token.top_reference.probability)}), "
        f"is {_quoted(token.top.text)} ({_probability(token.top.probability)})."
    )
    where = f"{token.subset}, {token.unit}, token {token.position + 1:,}; KL {divergence(token.kl)}"
    tokens = []
    for place, change in enumerate(token.passage):
        kinds, shade, title = [], "", ""
        if change.loss_change is not None:
            title = f"{change.loss_change:+.3f} nats"
            if abs(change.loss_change) >= SHADED:
                kinds.append("up" if change.loss_change > 0 else "down")
                shade = f"{min(1.0, 0.2 + 0.8 * abs(change.loss_change) / DEEPEST):.2f}"
        if place == token.index:
            kinds.append("here")
        text = visible(change.text, lines=True).replace("\n", "⏎\n" if kinds else "\n")
        tokens.append(Token(text, " ".join(kinds), shade, title))
    return {"says": says, "where": where, "tokens": tokens}


def _quoted(text: str) -> str:
    return f"“{visible(text)}”"


def _probability(p: float) -> str:
    return f"{100 * p:.1f} %" if p >= 0.001 else f"{100 * p:.1g} %" if p > 1e-6 else "under 0.0001 %"


def _start(text: str, length: int = 60) -> str:
    words = " ".join(visible(text, lines=True).split())
    return words if len(words) <= length else f"{words[:length].rstrip()}…"


def _headline(candidate: Candidate) -> str:
    interval = percent_interval(candidate.total)
    return f"perplexity {percent_change(candidate.total)}{f' ({interval})' if interval else ''}"


def _distribution_rows(change: Change) -> list[dict[str, Any]]:
    rows: list[tuple[str, Distribution | None]] = [
        ("KL divergence", change.divergence),
        ("change of −log p(token)", change.loss_change),
        ("change of p(token)", change.probability_change),
    ]
    return [
        {
            "name": name,
            "cells": [
                _compact(value)
                for value in (d.mean, d.rms, d.minimum, *(d.quantiles[q] for q in _QUANTILES), d.maximum)
            ],
        }
        for name, d in rows
        if d is not None
    ]


def _compact(value: float) -> str:
    text = f"{value:.2g}" if abs(value) >= 1e-4 or not value else f"{value:.0e}".replace("e-0", "e-")
    return f"−{text[1:]}" if text.startswith("-") else text
