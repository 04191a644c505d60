"""Intervals and errors against known cases."""

from __future__ import annotations

import math

import pytest
import torch

from neoquant.evaluation.statistics import mean_interval, ratio_error, ratio_interval, student_975


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_one_unit_says_nothing() -> None:
    assert ratio_interval(f64(3), f64(5)) is None
    assert ratio_error(f64(3), f64(5)) is None
    assert mean_interval([(f64(1, 2), f64(3, 3)), (f64(3), f64(5))]) is None
    assert mean_interval([]) is None


def test_units_that_agree_leave_no_doubt() -> None:
    sums, counts = f64(2, 4, 6), f64(10, 20, 30)
    assert ratio_interval(sums, counts) == pytest.approx((0.2, 0.2))
    assert ratio_error(sums, counts) == pytest.approx(0, abs=1e-12)


def test_error_of_equal_units_is_that_of_a_mean() -> None:
    values = f64(1, 2, 3, 4, 10)
    assert ratio_error(values, torch.ones_like(values)) == pytest.approx(float(values.std()) / math.sqrt(5))


def test_error_by_hand() -> None:
    # ratio 0.5; residuals 1 - 0.5 * 4 = -1 and 3 - 0.5 * 4 = 1; sqrt(2 / 1 * 2) / 8
    assert ratio_error(f64(1, 3), f64(4, 4)) == pytest.approx(2 / 8)


def test_symmetric_units_of_one_length_have_students_interval() -> None:
    values = f64(-3, -1, 0, 1, 3)
    reach = 2.7764 * float(values.std()) / math.sqrt(5)
    assert ratio_interval(7 + values, torch.ones_like(values)) == pytest.approx((7 - reach, 7 + reach), rel=1e-4)


def test_the_long_side_of_skewed_units_is_longer() -> None:
    ones = torch.ones(6, dtype=torch.float64)
    sums = f64(1, 1.1, 1.2, 1.3, 1.4, 4)
    right, left = ratio_interval(sums, ones), ratio_interval(-sums, ones)
    assert right is not None and left is not None
    mean = float(sums.mean())
    assert right.high - mean > 1.2 * (mean - right.low)
    assert left == pytest.approx((-right.high, -right.low))


def test_one_long_document_leaves_more_doubt_than_many_alike() -> None:
    noise = normal(10)
    long = f64(*[100] * 9, 10_000)
    alike = torch.full_like(long, float(long.mean()))
    widths = [
        interval.high - interval.low for c in (long, alike) if (interval := ratio_interval(noise * c, c)) is not None
    ]
    assert widths[0] > 2 * widths[1]


def test_interval_of_many_equal_units_is_the_normal_one() -> None:
    values = normal(400)
    interval = ratio_interval(values, torch.ones_like(values))
    error = 1.96 * float(values.std()) / math.sqrt(400)
    assert interval is not None
    assert interval.low == pytest.approx(float(values.mean()) - error, abs=0.1 * error)
    assert interval.high == pytest.approx(float(values.mean()) + error, abs=0.1 * error)


def test_mean_over_parts_of_equal_size_is_the_whole() -> None:
    values, ones = normal(400), torch.ones(400, dtype=torch.float64)
    whole = ratio_interval(values, ones)
    parts = mean_interval([(values[start::4], ones[start::4]) for start in range(4)])
    assert whole is not None and parts is not None
    assert parts == pytest.approx(whole, rel=0.05)


@pytest.mark.parametrize("documents", [5, 10, 40])
@pytest.mark.parametrize("noise", ["documents", "tokens"])
def test_coverage(documents: int, noise: str) -> None:
    """Documents of lengths that differ by an order of magnitude: 95 % intervals hold the truth about so often.

    eval/statistics/coverage.py counts more cases, more often.
    """
    generator = torch.Generator().manual_seed(documents)
    shape = (1000, documents)
    counts = torch.exp(5 + 0.7 * torch.randn(shape, generator=generator, dtype=torch.float64))
    error = torch.randn(shape, generator=generator, dtype=torch.float64)
    spread = 0.01 * counts if noise == "documents" else 0.3 * counts.sqrt()
    sums = counts * 0.02 + spread * error  # nats: what is true is 0.02 a token
    intervals = [ratio_interval(s, c) for s, c in zip(sums, counts, strict=True)]
    held = sum(i.low <= 0.02 <= i.high for i in intervals if i is not None)
    assert 0.93 <= held / len(intervals) <= 0.98


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.706), (1.5, 6.017), (2.5, 3.575), (9, 2.262), (10, 2.228), (11, 2.201), (30, 2.042), (1000, 1.962)],
)
def test_student(degrees: float, expected: float) -> None:
    assert student_975(degrees) == pytest.approx(expected, rel=0.03 if degrees % 1 else 3e-4)
