"""Quantiles of any number of values in a fixed amount of memory, by counting them in buckets.

DDSketch (Masson, Rim and Lee, 2019): buckets grow by a constant factor gamma, so a quantile has a bounded relative
error. Counts only add up, so neither the order of the values nor where they are counted changes the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch

RELATIVE_ACCURACY: Final = 0.0025
"""The largest relative error of a quantile (alpha in the paper)."""

SMALLEST: Final = 1e-8
"""Values nearer to zero than this count as zero."""

_GAMMA = (1 + RELATIVE_ACCURACY) / (1 - RELATIVE_ACCURACY)
_SIDE = math.ceil(math.log(1e3 / SMALLEST) / math.log(_GAMMA))  # buckets up to a magnitude of a thousand

BUCKETS: Final = 2 * _SIDE + 1
"""Negative values from the largest, zero, positive ones up to the largest."""


def bucket_indices(values: torch.Tensor) -> torch.Tensor:
    """The bucket of each value; int64, the shape of `values` (float64, finite)."""
    steps = (values.abs().clamp_min(SMALLEST) / SMALLEST).log() / math.log(_GAMMA)
    steps = 1 + steps.floor().to(torch.int64).clamp_(max=_SIDE - 1)
    return torch.where(values.abs() < SMALLEST, 0, torch.where(values < 0, -steps, steps)) + _SIDE


def bucket_values() -> torch.Tensor:
    """The value that stands for each bucket, within RELATIVE_ACCURACY of all in it; float64[BUCKETS], ascending."""
    positive = SMALLEST * _GAMMA ** torch.arange(1, _SIDE + 1, dtype=torch.float64) * 2 / (1 + _GAMMA)
    return torch.cat([-positive.flip(0), torch.zeros(1, dtype=torch.float64), positive])


def quantiles(counts: torch.Tensor, shares: Sequence[float]) -> list[float]:
    """The values that such shares of the counted values do not exceed; counts int64[BUCKETS], not all zero.

    The value of rank ceil(share * n), counted from one: no interpolation.
    """
    below = counts.cumsum(0)
    n = int(below[-1])
    ranks = torch.tensor([min(n, max(1, math.ceil(share * n - 1e-9))) for share in shares])
    return [float(value) for value in bucket_values()[torch.searchsorted(below, ranks)]]


def histogram_counts(counts: torch.Tensor, edges: Sequence[float]) -> tuple[list[int], int, int]:
    """The counts between ascending `edges`, below the first and from the last on.

    A bucket counts where its value lies, so an edge is right to within RELATIVE_ACCURACY.
    """
    index = torch.bucketize(bucket_values(), torch.tensor(edges, dtype=torch.float64), right=True)
    found = torch.zeros(len(edges) + 1, dtype=torch.int64).index_add_(0, index, counts).tolist()
    return found[1:-1], found[0], found[-1]
