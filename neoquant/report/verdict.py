"""What a comparison comes to, in one sentence."""

from __future__ import annotations

import math

from neoquant.evaluation.result import Candidate, Change, Comparison, ModelInfo
from neoquant.report.words import signed

TOLERANCE = 0.01
"""A loss of perplexity that is called small."""


def short_names(result: Comparison) -> dict[str, str]:
    """Candidates' names without what they share with the reference's: `nf4` for `gpt-neo-1.3B-nf4`."""
    base = result.reference.model.name
    names = [candidate.evaluation.model.name for candidate in result.candidates]
    short = {name: name.removeprefix(base).lstrip("-_ .") if name.startswith(base) else name for name in names}
    return (
        short
        if all(short.values()) and len(set(short.values())) == len(names)
        else dict(zip(names, names, strict=True))
    )


def recommended(result: Comparison) -> Candidate | None:
    """The smallest candidate that surely (with its interval's upper end) loses less than TOLERANCE of perplexity."""
    good = [candidate for candidate in result.candidates if _upper(candidate.total) < TOLERANCE]
    return min(good, key=lambda candidate: _size(candidate.evaluation.model), default=None)


def verdict(result: Comparison) -> str:
    """One sentence that says which candidate to take, what it saves and what it costs."""
    reference, candidates = result.reference, result.candidates
    if not candidates:
        return f"{reference.model.name} was compared with nothing."
    best = recommended(result)
    limit = f"{TOLERANCE:.0%}".replace("%", " %")
    if best is not None:
        opening = _name(best)
        opening += f" is the smallest of {len(candidates)} that" if len(candidates) > 1 else ""
        opening += f" keeps perplexity within {limit} of {reference.model.name}’s"
        return f"{opening}: {_saving(reference.model, best.evaluation.model)}{_cost(best.total)}."
    closest = min(candidates, key=lambda candidate: candidate.total.nats_per_token)
    cost = f"{_saving(reference.model, closest.evaluation.model)}{_cost(closest.total)}"
    if len(candidates) == 1:
        return f"{_name(closest)} may lose more than {limit} of perplexity: {cost}."
    return (
        f"None of {len(candidates)} candidates surely keeps perplexity within {limit}; {_name(closest)} comes "
        f"closest: {cost}."
    )


def percent_change(change: Change) -> str:
    """`+0.68 %`: of the perplexity."""
    return _percent(change.nats_per_token)


def percent_interval(change: Change) -> str | None:
    """`+0.56 to +0.79 %`, or None where there is none."""
    if change.low is None or change.high is None:
        return None
    return f"{_percent(change.low).removesuffix(' %')} to {_percent(change.high)}"


def size_ratio(reference: ModelInfo, model: ModelInfo) -> float | None:
    """The model's size over the reference's."""
    if not reference.bytes_on_disk or model.bytes_on_disk is None:
        return None
    return model.bytes_on_disk / reference.bytes_on_disk


def _percent(nats: float) -> str:
    percent = 100 * math.expm1(min(nats, 700))
    digits = 2 if abs(percent) < 10 else 1 if abs(percent) < 100 else 0
    return f"{signed(percent, digits)} %" if percent < 1e7 else f"{percent:+.1e} %"


def _saving(reference: ModelInfo, model: ModelInfo) -> str:
    ratio = size_ratio(reference, model)
    if ratio is None or reference.bytes_on_disk is None or model.bytes_on_disk is None:
        return ""
    return (
        f"{model.bytes_on_disk / 1e6:,.1f} MB instead of {reference.bytes_on_disk / 1e6:,.1f} ({100 * ratio:.0f} %), "
    )


def _cost(change: Change) -> str:
    interval = percent_interval(change)
    sure = f"95 % interval {interval}" if interval else "how sure, one document cannot say"
    return f"perplexity {percent_change(change)} ({sure})"


def _name(candidate: Candidate) -> str:
    return candidate.evaluation.model.name


def _upper(change: Change) -> float:
    return math.expm1(min(change.high, 700)) if change.high is not None else math.inf


def _size(model: ModelInfo) -> float:
    return math.inf if model.bytes_on_disk is None else model.bytes_on_disk
