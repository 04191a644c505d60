"""What a comparison comes to, in one sentence, and what a reader of that sentence should know.

Perplexity alone cannot judge a model: on text that the reference predicts poorly, predictions may change a lot and be
right as often as before. KL divergence sees every change: it is what the loss would rise by on text that the reference
wrote itself. So a candidate must pass both, by the same measure: 1 % of perplexity is 0.01 nats a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from neoquant.evaluation.result import Candidate, Change, Comparison, ModelInfo
from neoquant.report.formatting import divergence, signed

TOLERANCE = 0.01
"""A loss of perplexity that is called small."""

DIVERGENCE = 0.01
"""Nats a token: a mean KL divergence that is called small."""

NOTICED = 0.0005
"""Nats a token: below this mean KL divergence nobody will notice that predictions changed."""

NEARLY_AS_SMALL, CLOSER = 1.1, 2.0
"""A candidate of so many times the recommended one's size is worth naming where its KL is so many times smaller."""


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
    """The smallest candidate that surely (with the 95 % intervals' upper ends) loses less than TOLERANCE of perplexity
    and diverges by less than DIVERGENCE; where divergence was not measured, perplexity alone decides."""
    good = [c for c in result.candidates if _upper(c.total) < TOLERANCE and _upper_kl(c.total) < DIVERGENCE]
    return min(good, key=lambda candidate: _size(candidate.evaluation.model), default=None)


def verdict(result: Comparison) -> str:
    """One sentence that says which candidate to take, what it saves and what it costs."""
    reference, candidates = result.reference, result.candidates
    if not candidates:
        return f"{reference.model.name} was compared with nothing."
    best = recommended(result)
    bounds = f"within {100 * TOLERANCE:g} % of {reference.model.name}’s perplexity"
    if all(candidate.total.kl is not None for candidate in candidates):
        bounds += f" and {DIVERGENCE:g} nats of its predictions (KL)"
    if best is not None:
        opening = _name(best)
        opening += f" is the smallest of {len(candidates)} that" if len(candidates) > 1 else ""
        opening += f" stays {bounds}"
        return f"{opening}: {_saving(reference.model, best.evaluation.model)}{_cost(best.total)}."
    closest = min(candidates, key=lambda candidate: max(candidate.total.nats_per_token, candidate.total.kl or 0))
    cost = f"{_saving(reference.model, closest.evaluation.model)}{_cost(closest.total)}"
    if len(candidates) == 1:
        return f"{_name(closest)} does not surely stay {bounds}: {cost}."
    return f"None of {len(candidates)} candidates surely stays {bounds}; {_name(closest)} comes closest: {cost}."


def remarks(result: Comparison) -> list[str]:
    """What the verdict does not say: where perplexity is blind, and what a little more space would bring."""
    return [*_blind(result), *_a_little_more(result), *_unmeasured(result)]


def _blind(result: Comparison) -> Iterator[str]:
    """That predictions changed where perplexity did not surely rise."""
    unseen = [
        (c.total.kl, _name(c))
        for c in result.candidates
        if c.total.kl is not None and c.total.kl >= NOTICED and c.total.low is not None and c.total.low <= 0
    ]
    if not unseen:
        return
    least, most = divergence(min(unseen)[0]), divergence(max(unseen)[0])
    span = most if least == most else f"{least} to {most}"
    who = f"{unseen[0][1]}’s predictions" if len(unseen) == 1 else f"the predictions of {len(unseen)} candidates"
    yield (
        f"Perplexity tells little on this text: {who} changed (KL {span}), and perplexity did not surely rise. "
        "Go by KL and by the same top token."
    )


def _a_little_more(result: Comparison) -> Iterator[str]:
    """The candidate that is hardly larger than the recommended one, and much closer to the reference."""
    best = recommended(result)
    if best is None or best.total.kl is None or best.total.kl < NOTICED:
        return
    size, kl = _size(best.evaluation.model), best.total.kl
    closer = [
        c
        for c in result.candidates
        if c.total.kl is not None
        and size < _size(c.evaluation.model) <= NEARLY_AS_SMALL * size
        and c.total.kl * CLOSER <= kl
    ]
    if not closer:
        return
    other = min(closer, key=lambda c: (c.total.kl, _size(c.evaluation.model)))
    more = f"{(_size(other.evaluation.model) - size) / 1e6:,.1f} MB"
    yield f"For {more} more, {_name(other)} stays closer: KL {divergence(other.total.kl)} instead of {divergence(kl)}."


def _unmeasured(result: Comparison) -> Iterator[str]:
    if any(c.total.kl is None for c in result.candidates):
        yield "Where KL was not measured, perplexity alone decided, which does not see every change."


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
    kl = "" if change.kl is None else f", KL {divergence(change.kl)}"
    return f"perplexity {percent_change(change)} ({sure}){kl}"


def _name(candidate: Candidate) -> str:
    return candidate.evaluation.model.name


def _upper(change: Change) -> float:
    return math.expm1(min(change.high, 700)) if change.high is not None else math.inf


def _upper_kl(change: Change) -> float:
    """The upper end of the interval of KL; what was not measured stands in nobody's way."""
    if change.kl is None:
        return 0.0
    return math.inf if change.kl_error is None else change.kl + 1.96 * change.kl_error


def _size(model: ModelInfo) -> float:
    return math.inf if model.bytes_on_disk is None else model.bytes_on_disk
