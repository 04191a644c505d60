"""Quantiles from counts against sorted values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neoquant.evaluation.quantile_sketch import (
    BUCKETS,
    RELATIVE_ACCURACY,
    SMALLEST,
    bucket_indices,
    bucket_values,
    histogram_counts,
    quantiles,
)

SHARES = (0.001, 0.1, 0.5, 0.9, 0.999, 1.0)


def counted(values: torch.Tensor) -> torch.Tensor:
    return torch.bincount(bucket_indices(values), minlength=BUCKETS)


@given(st.lists(st.floats(-900, 900), min_size=1, max_size=60))
def test_quantiles_are_those_of_the_sorted_values(values: list[float]) -> None:
    found = quantiles(counted(torch.tensor(values, dtype=torch.float64)), SHARES)
    ordered = sorted(values)
    for share, value in zip(SHARES, found, strict=True):
        exact = ordered[max(0, math.ceil(share * len(values)) - 1)]
        assert value == pytest.approx(exact, rel=1.001 * RELATIVE_ACCURACY, abs=SMALLEST)


def test_every_centre_is_in_its_own_bin() -> None:
    assert torch.equal(bucket_indices(bucket_values()), torch.arange(BUCKETS))


def test_what_is_too_large_counts_in_the_last_bins() -> None:
    assert bucket_indices(torch.tensor([-1e9, 1e9, 0.0, -0.0, 1e-9], dtype=torch.float64)).tolist() == [
        *(0, BUCKETS - 1),
        *[BUCKETS // 2] * 3,
    ]


def test_regrouped_counts_add_up() -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    edges = [step / 10 for step in range(-15, 16)]
    inside, below, above = histogram_counts(counted(values), edges)
    assert sum(inside) + below + above == len(values)
    exact = torch.histogram(values, torch.tensor(edges, dtype=torch.float64)).hist
    assert (torch.tensor(inside) - exact).abs().max() <= 5  # what lies within 0.25 % of an edge
