"""How sure a figure is: intervals and errors of ratios, where whole documents were drawn.

Tokens of one document are alike, so documents are the sample, not tokens. Everything is worked out from the documents
left out one at a time (the jackknife): it takes one pass over them and no random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

NORMAL_975 = 1.959964
STUDENT_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)  # 1 to 10 degrees
SKEW = 2.0
"""How many times Johnson's correction an interval is extended by. His own, 1, is meant for a skewness that is known;
that of ten documents is estimated far too small. eval/statistics/coverage.py compares."""

Parts = Sequence[tuple[torch.Tensor, torch.Tensor]]


class ConfidenceInterval(NamedTuple):
    low: float
    high: float


def ratio_interval(sums: torch.Tensor, counts: torch.Tensor) -> ConfidenceInterval | None:
    """The 95 % interval of sum(sums) / sum(counts), where units (documents) were drawn.

    sums, counts: float64[n]; counts (tokens or bytes) are positive. Pass differences between two models on the same
    units for a paired interval. None for fewer than two units, from which nothing can be said.
    """
    return mean_interval([(sums, counts)])


def mean_interval(parts: Parts) -> ConfidenceInterval | None:
    """The 95 % interval of the mean over parts (subsets) of sum(sums) / sum(counts), units drawn within each part.

    Student's t with the jackknife's error, and three things that matter where documents are few:

    - a long document counts for many: a part has (sum c)^2 / sum c^2 - 1 degrees of freedom, not its units less one,
      and parts add up as Welch and Satterthwaite have it;
    - a skewed sample misses on its long side: that side is extended by a multiple of Johnson's correction (1978,
      "Modified t tests and confidence intervals for asymmetrical populations");
    - a document left out changes the ratio by more than its residual says, which the jackknife knows.

    None where a part has fewer than two units.
    """
    if not parts or any(len(sums) < 2 for sums, _ in parts):
        return None
    estimate = variance = third = square = spread = 0.0
    for sums, counts in parts:
        n, count = len(sums), counts.sum()
        ratio = sums.sum() / count
        left_out = (sums.sum() - sums) / (count - counts)
        part = float(((left_out - left_out.mean()) ** 2).sum()) * (n - 1) / n
        residuals = (sums - ratio * counts) / count
        degrees = max(1.0, float(count**2 / (counts**2).sum()) - 1)
        estimate += float(ratio) / len(parts)
        variance += part
        spread += part**2 / degrees
        third += float((residuals**3).sum())
        square += float((residuals**2).sum())
    if variance == 0 or square == 0:
        return ConfidenceInterval(estimate, estimate)
    t = student_975(variance**2 / spread)
    error = math.sqrt(variance) / len(parts)
    extension = SKEW * third / square**1.5 / 6 * (1 + 2 * t**2) * error
    return ConfidenceInterval(estimate - t * error + min(0.0, extension), estimate + t * error + max(0.0, extension))


def ratio_error(sums: torch.Tensor, counts: torch.Tensor) -> float | None:
    """The standard error of sum(sums) / sum(counts) where whole units were drawn, None for fewer than two.

    sqrt(n / (n - 1) * sum (s - r c)^2) / sum c (Cochran, 1977, Sampling Techniques, chapter 6).
    """
    n = len(sums)
    if n < 2:
        return None
    ratio = sums.sum() / counts.sum()
    spread = ((sums - ratio * counts) ** 2).sum() * n / (n - 1)
    return float(spread.sqrt() / counts.sum())


def student_975(degrees: float) -> float:
    """Student's t at 97.5 %; degrees of freedom need not be whole, and are at least 1.

    A table up to 10, between whole degrees on a straight line of log t over 1/degrees; beyond it the expansion in
    1/degrees, right to four digits.
    """
    if degrees <= len(STUDENT_975):
        whole = max(1, min(int(degrees), len(STUDENT_975) - 1))
        low, high = STUDENT_975[whole - 1], STUDENT_975[whole]
        share = (1 / whole - 1 / max(1.0, degrees)) / (1 / whole - 1 / (whole + 1))
        return float(low * (high / low) ** share)
    z = NORMAL_975
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )
