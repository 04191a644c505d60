"""Whether a candidate is close enough to the reference: one of three states for each bound, decided from intervals.

Perplexity alone cannot judge a model: on text that the reference predicts poorly, predictions may change a lot and be
right as often as before. KL divergence sees every change: it is what the loss would rise by on text that the reference
wrote itself. So a candidate must pass both, by the same measure: 1 % of perplexity is 0.01 nats a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from neoquant.evaluation.result import Candidate, Change, Comparison, ModelInfo
from neoquant.report.formatting import divergence, divergence_interval, signed
from neoquant.sizes import size

TOLERANCE = 0.01
"""The bound of the loss of perplexity, as a ratio."""

DIVERGENCE = 0.01
"""The bound of the mean KL divergence, nats a token."""


class State(Enum):
    """What a measured interval says about a bound."""

    PASSES = "passes"
    NEEDS_MORE_TEXT = "needs more text"
    FAILS = "fails"


def state_of(low: float | None, high: float | None, bound: float) -> State:
    """PASSES where the whole interval is below the bound, FAILS where no part of it is; else more text must decide."""
    if low is None or high is None:
        return State.NEEDS_MORE_TEXT
    return State.PASSES if high < bound else State.FAILS if low >= bound else State.NEEDS_MORE_TEXT


class Verdict(NamedTuple):
    """A candidate's state for each bound; `kl` is None where KL was not measured, and perplexity alone decides."""

    perplexity: State
    kl: State | None

    @property
    def state(self) -> State:
        """The worst of both."""
        states = {self.perplexity, self.kl or State.PASSES}
        return next(state for state in (State.FAILS, State.NEEDS_MORE_TEXT, State.PASSES) if state in states)


def verdict_of(change: Change) -> Verdict:
    """How a candidate's total change (or a subset's) stands against both bounds."""
    return Verdict(
        state_of(change.low, change.high, math.log1p(TOLERANCE)),
        None if change.kl is None else state_of(change.kl_low, change.kl_high, DIVERGENCE),
    )


def recommended(result: Comparison) -> Candidate | None:
    """The smallest candidate that passes."""
    good = [c for c in result.candidates if verdict_of(c.total).state is State.PASSES]
    return min(good, key=lambda candidate: size_of(candidate.evaluation.model), default=None)


def closest(result: Comparison) -> Candidate | None:
    """The candidate that is nearest to the reference in both measures."""
    return min(result.candidates, key=lambda c: max(c.total.nats_per_token, c.total.kl or 0), default=None)


def subject(result: Comparison) -> Candidate | None:
    """The candidate that the report is about first: the recommended one, else the closest."""
    return recommended(result) or closest(result)


def headline(result: Comparison) -> str:
    """One short sentence: which candidate passes."""
    about = subject(result)
    if about is None:
        return f"{result.reference.model.name} was compared with nothing."
    name, count = about.evaluation.model.name, len(result.candidates)
    state = verdict_of(about.total)
    if state.state is State.PASSES:
        passing = sum(verdict_of(c.total).state is State.PASSES for c in result.candidates)
        if count == 1:
            return f"{name} passes."
        return f"{name} is the smallest of {passing} models that pass." if passing > 1 else f"Only {name} passes."
    if count == 1:
        return f"{name} {state.state.value}."
    undecided = any(verdict_of(c.total).state is State.NEEDS_MORE_TEXT for c in result.candidates)
    return f"None of {count} models {'passes yet' if undecided else 'passes'}; {name} is closest."


def verdict(result: Comparison) -> str:
    """The headline, and the figures that it was decided from."""
    about = subject(result)
    return headline(result) if about is None else f"{headline(result)} {figures(result, about)}"


def figures(result: Comparison, candidate: Candidate) -> str:
    """`Perplexity +0.40 % (95 % interval +0.20 to +0.70 %, bound 1 %: passes); KL ...; 300.0 MB instead of ...`"""
    change, state = candidate.total, verdict_of(candidate.total)
    interval = percent_interval(change)
    between = f"95 % interval {interval}" if interval else "no interval from one document"
    found = [f"Perplexity {percent_change(change)} ({between}, bound {100 * TOLERANCE:g} %: {state.perplexity.value})"]
    if state.kl is not None:
        found.append(f"KL {divergence_interval(change)} nats a token (bound {DIVERGENCE:g}: {state.kl.value})")
    found += size_change(result.reference.model, candidate.evaluation.model)
    return f"{'; '.join(found)}."


def size_change(reference: ModelInfo, model: ModelInfo) -> Sequence[str]:
    """`300.0 MB instead of 2,631.0 MB (11 %)`, or nothing where a size is not known."""
    ratio = size_ratio(reference, model)
    if ratio is None or reference.bytes_on_disk is None or model.bytes_on_disk is None:
        return []
    return [f"{size(model.bytes_on_disk)} instead of {size(reference.bytes_on_disk)} ({100 * ratio:.0f} %)"]


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


def percent_change(change: Change) -> str:
    """`+0.68 %`: of the perplexity."""
    return _percent(change.nats_per_token)


def percent_interval(change: Change) -> str | None:
    """`+0.56 to +0.79 %`, or None where there is none."""
    if change.low is None or change.high is None:
        return None
    return f"{_percent(change.low).removesuffix(' %')} to {_percent(change.high)}"


def kl_interval(change: Change) -> str | None:
    """`0.00060 to 0.00071`, or None where there is none."""
    if change.kl_low is None or change.kl_high is None:
        return None
    return f"{divergence(change.kl_low)} to {divergence(change.kl_high)}"


def size_ratio(reference: ModelInfo, model: ModelInfo) -> float | None:
    """The model's size over the reference's."""
    if not reference.bytes_on_disk or model.bytes_on_disk is None:
        return None
    return model.bytes_on_disk / reference.bytes_on_disk


def size_of(model: ModelInfo) -> float:
    """Bytes on disk; infinite where they are not known, so that such a model is nobody's smallest."""
    return math.inf if model.bytes_on_disk is None else model.bytes_on_disk


def _percent(nats: float) -> str:
    percent = 100 * math.expm1(min(nats, 700))
    digits = 2 if abs(percent) < 10 else 1 if abs(percent) < 100 else 0
    return f"{signed(percent, digits)} %" if percent < 1e7 else f"{percent:+.1e} %"
