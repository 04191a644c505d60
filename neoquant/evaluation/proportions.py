"""How sure a share of right answers is, and its change from one model to another on the same documents.

Answers are right or wrong, often few, and between two good models often the same: leaving documents out one at a time
(`statistics`) would then claim that there is no doubt at all. These intervals hold for that case, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from neoquant.evaluation.statistics import NORMAL_975, ConfidenceInterval, ratio_interval


def mean_score_interval(values: Sequence[float]) -> ConfidenceInterval | None:
    """The 95 % interval of the mean of documents' scores: Wilson's where each is 0 or 1, else the jackknife's.

    Wilson, 1927, "Probable inference, the law of succession, and statistical inference". None for fewer than two.
    """
    n = len(values)
    if n < 2:
        return None
    if not _binary(values):
        return _jackknife(values)
    share, z2 = math.fsum(values) / n, NORMAL_975**2
    center = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = NORMAL_975 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return ConfidenceInterval(max(0.0, center - reach), min(1.0, center + reach))


def paired_interval(before: Sequence[float], after: Sequence[float]) -> ConfidenceInterval | None:
    """The 95 % interval of the mean of `after` less that of `before`, scores of the same documents.

    Where all are 0 or 1, half a document is added to each of the four outcomes of a pair (Agresti and Min, 2005,
    "Simple improved confidence intervals for comparing matched proportions"); else the jackknife's. None for fewer
    than two.
    """
    n = len(before)
    if n < 2:
        return None
    if not (_binary(before) and _binary(after)):
        return _jackknife([b - a for a, b in zip(before, after, strict=True)])
    gained = sum(b > a for a, b in zip(before, after, strict=True)) + 0.5
    lost = sum(b < a for a, b in zip(before, after, strict=True)) + 0.5
    n += 2
    difference = (gained - lost) / n
    reach = NORMAL_975 * math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
    return ConfidenceInterval(max(-1.0, difference - reach), min(1.0, difference + reach))


def mean_of_intervals(
    estimates: Sequence[float], intervals: Sequence[ConfidenceInterval | None]
) -> ConfidenceInterval | None:
    """The 95 % interval of the plain mean of independent estimates, from the interval of each; None where one has none.

    Each limit's distance is the root of the sum of squared distances (Zou and Donner, 2008, "Construction of confidence
    limits about effect measures").
    """
    known = [interval for interval in intervals if interval is not None]
    if len(known) < len(estimates) or not estimates:
        return None
    n = len(estimates)
    mean = math.fsum(estimates) / n
    below = math.sqrt(sum((e - i.low) ** 2 for e, i in zip(estimates, known, strict=True)))
    above = math.sqrt(sum((i.high - e) ** 2 for e, i in zip(estimates, known, strict=True)))
    return ConfidenceInterval(mean - below / n, mean + above / n)


def _binary(values: Sequence[float]) -> bool:
    return all(value in (0, 1) for value in values)


def _jackknife(values: Sequence[float]) -> ConfidenceInterval | None:
    column = torch.tensor(list(values), dtype=torch.float64)
    return ratio_interval(column, torch.ones_like(column))
