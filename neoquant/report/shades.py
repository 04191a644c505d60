"""How deep the ground of a heat map's cell is: anchored to a bound where there is one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Shade = Callable[[float], float]
"""A value -> 0 (no ground) to 1 (the deepest)."""


def anchored(bound: float) -> Shade:
    """A tenth of the bound or less is 0, the bound one half, ten times the bound or more 1; logarithmic between."""

    def shade(value: float) -> float:
        if value <= 0:
            return 0.0
        return min(1.0, max(0.0, 0.5 + 0.5 * math.log10(value / bound)))

    return shade


def relative(values: Sequence[float]) -> Shade:
    """Where a value lies between the least (0) and the largest (1), on a logarithmic scale; 0 and less are 0.

    For measures without a bound. The scale spans a factor of ten at least: what hardly differs shall not look as if it
    did.
    """
    positive = [value for value in values if value > 0]
    high = max(positive, default=1.0)
    low = min(*positive, high / 10) if positive else high / 10

    def shade(value: float) -> float:
        if value <= 0:
            return 0.0
        return math.log(value / low) / math.log(high / low)

    return shade
