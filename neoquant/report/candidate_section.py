"""One candidate's section of a page: charts, figures by subset, and the passages where predictions differ most."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from neoquant.evaluation.result import Candidate, Change, Choice, Comparison, Distribution, WorstToken
from neoquant.report import charts
from neoquant.report.formatting import agreement_interval, change_interval, divergence, divergence_interval, perplexity
from neoquant.report.page_elements import Chart, chart, unbroken, visible
from neoquant.report.subsets import subset_names
from neoquant.report.verdict import percent_change, percent_interval, verdict_of

PASSAGES = 8  # shown of each candidate
SHADED = 0.15  # nats: a token that changed by less has no ground
DEEPEST = 3.0  # nats: a change of this or more has the deepest
_QUANTILES = ("1", "5", "25", "50", "75", "95", "99", "99.9")


class Token(NamedTuple):
    text: str
    kind: str = ""  # classes: up, down, here
    shade: str = ""
    title: str = ""


def candidate_section(result: Comparison, candidate: Candidate, short: str, *, opened: bool) -> dict[str, Any]:
    """What the template shows of `candidate`, called `short` in passages; `opened` from the start or not."""
    key = f"c{result.candidates.index(candidate)}"
    return {
        "name": candidate.evaluation.model.name,
        "state": verdict_of(candidate.total).state.value,
        "headline": unbroken(_headline(candidate)),
        "open": opened,
        "charts": _charts(candidate, key),
        "quantiles": ["mean", "RMS", "least", *(f"{q} %" for q in _QUANTILES), "most"],
        "distributions": _distribution_rows(candidate.total),
        "subsets": _subset_rows(result, candidate),
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


def _subset_rows(result: Comparison, candidate: Candidate) -> list[dict[str, Any]]:
    changes = [*candidate.subsets, candidate.total]
    scores = [*candidate.evaluation.subsets, candidate.evaluation.total]
    befores = [*result.reference.subsets, result.reference.total]
    names, _ = subset_names(result.reference)
    return [
        {
            "name": name,
            "total": score is scores[-1],
            "tokens": f"{score.tokens:,}",
            "perplexity": f"{perplexity(before)} → {perplexity(score)}",
            "change": change_interval(change),
            "kl": divergence_interval(change),
            "agreement": agreement_interval(change),
        }
        for name, before, score, change in zip(names, befores, scores, changes, strict=True)
    ]


def _charts(candidate: Candidate, key: str) -> list[Chart]:
    model = candidate.evaluation.model.name
    rows = [charts.Interval.of_change(visible(change.subset), change, False) for change in candidate.subsets]
    rows.append(charts.Interval.of_change("total", candidate.total, True))
    title = "Change of perplexity by subset"
    svg = charts.interval_chart(rows, f"{key}-subsets", f"{title}: {model}", "change of perplexity, %")
    made = [chart(title, "In per cent, with 95 % intervals.", svg)]
    loss, kl = candidate.total.loss_change, candidate.total.divergence
    if loss is not None:
        label = "−log p(token) above the reference’s, nats"
        note = "Right of zero: less likely than in the reference."
        made += _histogram(loss, f"{key}-loss", "Change of single tokens’ loss", model, label, note)
    if kl is not None:
        label, note = "KL divergence, nats", "Both axes are logarithmic."
        made += _histogram(kl, f"{key}-kl", "KL divergence of single tokens", model, label, note)
    return made


def _histogram(spread: Distribution, key: str, title: str, model: str, label: str, note: str) -> list[Chart]:
    """The chart of a distribution, or nothing where it has no histogram, or an empty one."""
    histogram = spread.histogram
    if histogram is None or not sum(histogram.counts):
        return []
    sides = ((histogram.below, "left"), (histogram.above, "right"))
    outside = [f"{count:,} lie further {side}" for count, side in sides if count]
    svg = charts.histogram_chart(histogram.edges, histogram.counts, key, f"{title}: {model}", label)
    return [chart(title, f"{note}{' ' + ', '.join(outside) + '.' if outside else ''}", svg)]


def _passage(token: WorstToken, reference: str, candidate: str) -> dict[str, Any]:
    """The token in its text, and for both models how likely it was and what they found likeliest."""
    models = (
        (reference, token.probability_reference, token.top_tokens_reference or (token.top_reference,)),
        (candidate, token.probability, token.top_tokens or (token.top,)),
    )
    return {
        "token": _quoted(token.token),
        "where": f"{token.subset}, {token.unit}, token {token.position + 1:,}; KL {divergence(token.kl)}",
        "models": [
            {"name": visible(name), "probability": _probability(p), "top": [_choice(choice) for choice in tops]}
            for name, p, tops in models
        ],
        "tokens": list(_passage_tokens(token)),
    }


def _passage_tokens(token: WorstToken) -> Iterator[Token]:
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
        yield Token(text, " ".join(kinds), shade, title)


def _choice(choice: Choice) -> dict[str, str]:
    return {"text": _quoted(choice.text), "probability": _probability(choice.probability)}


def _quoted(text: str) -> str:
    return f"“{visible(text)}”"


def _probability(p: float) -> str:
    return f"{100 * p:.1f} %" if p >= 0.001 else f"{100 * p:.1g} %" if p > 1e-6 else "under 0.0001 %"


def _start(text: str, length: int = 60) -> str:
    line = " ".join(visible(text, lines=True).split())
    return line if len(line) <= length else f"{line[:length].rstrip()}…"


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
