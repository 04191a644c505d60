"""Intervals and errors against known cases."""

from __future__ import annotations

import math

import pytest
import torch

from neoquant.evaluation.statistics import bootstrap_interval, ratio_error, student_975


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_one_unit_says_nothing() -> None:
    assert bootstrap_interval(f64(3), f64(5)) is None
    assert ratio_error(f64(3), f64(5)) is None


def test_units_that_agree_leave_no_doubt() -> None:
    sums, counts = f64(2, 4, 6), f64(10, 20, 30)
    interval = bootstrap_interval(sums, counts)
    assert interval is not None and interval == pytest.approx((0.2, 0.2))
    assert ratio_error(sums, counts) == pytest.approx(0, abs=1e-12)


def test_error_of_equal_units_is_that_of_a_mean() -> None:
    values = f64(1, 2, 3, 4, 10)
    assert ratio_error(values, torch.ones_like(values)) == pytest.approx(float(values.std()) / math.sqrt(5))


def test_error_by_hand() -> None:
    # ratio 0.5; residuals 1 - 0.5 * 4 = -1 and 3 - 0.5 * 4 = 1; sqrt(2 / 1 * 2) / 8
    assert ratio_error(f64(1, 3), f64(4, 4)) == pytest.approx(2 / 8)


def test_interval_of_many_equal_units_is_the_normal_one() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    interval = bootstrap_interval(values, torch.ones_like(values))
    error = 1.96 * float(values.std()) / math.sqrt(400)
    assert interval is not None
    assert interval.low == pytest.approx(float(values.mean()) - error, abs=0.1 * error)
    assert interval.high == pytest.approx(float(values.mean()) + error, abs=0.1 * error)


def test_interval_is_the_same_again_for_the_same_seed() -> None:
    sums, counts = torch.arange(20, dtype=torch.float64), torch.linspace(5, 50, 20, dtype=torch.float64)
    assert bootstrap_interval(sums, counts) == bootstrap_interval(sums, counts)
    assert bootstrap_interval(sums, counts, seed=1) != bootstrap_interval(sums, counts, seed=2)


@pytest.mark.parametrize("documents", [5, 10, 40])
def test_coverage(documents: int) -> None:
    """Documents of lengths that differ by an order of magnitude: 95 % intervals hold the truth about so often."""
    generator = torch.Generator().manual_seed(documents)
    shape = (600, documents)
    counts = torch.exp(5 + 0.7 * torch.randn(shape, generator=generator, dtype=torch.float64))
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    sums = counts * 0.02 + 0.3 * counts.sqrt() * noise  # nats: what is true is 0.02 a token
    intervals = [bootstrap_interval(s, c, resamples=500) for s, c in zip(sums, counts, strict=True)]
    held = sum(i.low <= 0.02 <= i.high for i in intervals if i is not None)
    assert 0.93 <= held / len(intervals) <= 0.97


@pytest.mark.parametrize(("degrees", "expected"), [(1, 12.706), (9, 2.262), (11, 2.201), (30, 2.042), (1000, 1.962)])
def test_student(degrees: int, expected: float) -> None:
    assert student_975(degrees) == pytest.approx(expected, abs=6e-4)
