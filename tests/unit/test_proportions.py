"""Intervals of shares and of their paired changes, against exact enumeration and the published formulas."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from neoquant.evaluation.proportions import mean_of_intervals, mean_score_interval, paired_interval
from neoquant.evaluation.statistics import ConfidenceInterval, ratio_interval


def covered_share(n: int, share: float) -> float:
    """How often the interval of `n` answers holds the true share, over every outcome."""
    total = 0.0
    for right in range(n + 1):
        interval = mean_score_interval([1.0] * right + [0.0] * (n - right))
        assert interval is not None
        if interval.low <= share <= interval.high:
            total += math.comb(n, right) * share**right * (1 - share) ** (n - right)
    return total


def covered_change(n: int, gain: float, loss: float) -> float:
    """The same of the change, where a pair is gained or lost with these probabilities."""
    total = 0.0
    for gained, lost in product(range(n + 1), repeat=2):
        if gained + lost > n:
            continue
        before = [0.0] * gained + [1.0] * (n - gained)
        after = [1.0] * gained + [0.0] * lost + [1.0] * (n - gained - lost)
        interval = paired_interval(before, after)
        assert interval is not None
        if interval.low <= gain - loss <= interval.high:
            ways = math.comb(n, gained) * math.comb(n - gained, lost)
            total += ways * gain**gained * loss**lost * (1 - gain - loss) ** (n - gained - lost)
    return total


def test_wilson_as_published() -> None:
    """Newcombe, 1998, "Two-sided confidence intervals for the single proportion", table I: 81 of 263, 15 of 148, 1 of
    29."""
    for right, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (1, 29, 0.0061, 0.1718)):
        interval = mean_score_interval([1] * right + [0] * (n - right))
        assert interval == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("n", [10, 40])
def test_a_share_is_covered(n: int) -> None:
    found = [covered_share(n, share / 50) for share in range(1, 50)]
    assert min(found) > 0.83 and sum(found) / len(found) > 0.945


@pytest.mark.parametrize("n", [12, 20])
def test_a_change_is_covered(n: int) -> None:
    rates = [(gain, loss) for gain in (0.01, 0.05, 0.2, 0.35) for loss in (0.01, 0.05, 0.2, 0.35)]
    found = [covered_change(n, gain, loss) for gain, loss in rates]
    assert min(found) > 0.9 and sum(found) / len(found) > 0.945


def test_no_change_is_not_certain() -> None:
    interval = paired_interval([1, 0, 1, 1], [1, 0, 1, 1])
    assert interval is not None and interval.low < 0 < interval.high
    reach = 1.959964 * math.sqrt(6 - 25 / 7) / 7  # 5.5 gained, half a document lost, of 7
    assert paired_interval([0.0] * 5, [1.0] * 5) == pytest.approx((5 / 7 - reach, 1.0))


def test_scores_between_are_the_jackknifes() -> None:
    before, after = [0.2, 0.5, 1.0, 0.0], [0.3, 0.5, 0.8, 0.9]
    one = torch.ones(4, dtype=torch.float64)
    assert mean_score_interval(after) == ratio_interval(torch.tensor(after, dtype=torch.float64), one)
    change = torch.tensor([b - a for a, b in zip(before, after, strict=True)], dtype=torch.float64)
    assert paired_interval(before, after) == ratio_interval(change, one)


def test_one_document_says_nothing() -> None:
    assert mean_score_interval([1.0]) is None and paired_interval([1.0], [0.0]) is None


def test_the_mean_of_independent_intervals() -> None:
    """Symmetric limits add as errors do."""
    found = mean_of_intervals([1.0, 3.0], [ConfidenceInterval(0.7, 1.3), ConfidenceInterval(2.6, 3.4)])
    assert found == pytest.approx((2 - 0.25, 2 + 0.25))
    assert mean_of_intervals([1.0, 3.0], [ConfidenceInterval(0.7, 1.3), None]) is None
