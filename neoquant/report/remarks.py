"""What the verdict does not say: where perplexity is blind, and what a little more space would bring."""

from __future__ import annotations

from collections.abc import Iterator

from neoquant.evaluation.result import Comparison
from neoquant.report.formatting import divergence
from neoquant.report.verdict import recommended, size_of
from neoquant.sizes import size

NOTICED = 0.0005
"""Nats a token: below this mean KL divergence nobody will notice that predictions changed."""

NEARLY_AS_SMALL, CLOSER = 1.1, 2.0
"""A candidate of so many times the recommended one's size is worth naming where its KL is so many times smaller."""


def remarks(result: Comparison) -> list[str]:
    """One sentence or two each; none where there is nothing to add."""
    return [*_blind(result), *_a_little_more(result), *_unmeasured(result)]


def _blind(result: Comparison) -> Iterator[str]:
    """That predictions changed where perplexity did not surely rise."""
    blind = [
        (c.total.kl, c.evaluation.model.name)
        for c in result.candidates
        if c.total.kl is not None and c.total.kl >= NOTICED and c.total.low is not None and c.total.low <= 0
    ]
    if not blind:
        return
    least, most = divergence(min(blind)[0]), divergence(max(blind)[0])
    span = most if least == most else f"{least} to {most}"
    who = f"{blind[0][1]}’s predictions" if len(blind) == 1 else f"the predictions of {len(blind)} models"
    yield (
        f"Perplexity shows little on this text: {who} changed (KL {span}), but the interval of the change of "
        "perplexity includes zero. Judge by KL and by the same top token."
    )


def _a_little_more(result: Comparison) -> Iterator[str]:
    """The candidate that is hardly larger than the recommended one, and much closer to the reference."""
    best = recommended(result)
    if best is None or best.total.kl is None or best.total.kl < NOTICED:
        return
    bytes_on_disk, kl = size_of(best.evaluation.model), best.total.kl
    closer = [
        c
        for c in result.candidates
        if c.total.kl is not None
        and bytes_on_disk < size_of(c.evaluation.model) <= NEARLY_AS_SMALL * bytes_on_disk
        and c.total.kl * CLOSER <= kl
    ]
    if not closer:
        return
    other = min(closer, key=lambda c: (c.total.kl, size_of(c.evaluation.model)))
    more = size(size_of(other.evaluation.model) - bytes_on_disk)
    name = other.evaluation.model.name
    yield f"For {more} more, {name} stays closer: KL {divergence(other.total.kl)} instead of {divergence(kl)}."


def _unmeasured(result: Comparison) -> Iterator[str]:
    if any(c.total.kl is None for c in result.candidates):
        yield "Where KL was not measured, perplexity alone decided, which does not see every change."
