"""Quantiles of any number of values in a fixed amount of memory, by counting them in bins.

Bins grow by a constant factor, so that a quantile is right to a fixed share of its value (Masson, Rim and Lee, 2019,
"DDSketch"). Counts only add up: in whatever order values arrive, and wherever they are counted, the result is the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch

ACCURACY: Final = 0.0025
"""A quantile's relative error, at most."""

SMALLEST: Final = 1e-8
"""Values nearer to zero than this count as zero."""

_GROWTH = (1 + ACCURACY) / (1 - ACCURACY)
_SIDE = math.ceil(math.log(1e3 / SMALLEST) / math.log(_GROWTH))  # bins up to a magnitude of a thousand

BINS: Final = 2 * _SIDE + 1
"""Negative values from the largest, zero, positive ones up to the largest."""


def bins(values: torch.Tensor) -> torch.Tensor:
    """The bin of each value; int64, the shape of `values` (float64, finite)."""
    steps = (values.abs().clamp_min(SMALLEST) / SMALLEST).log() / math.log(_GROWTH)
    steps = 1 + steps.floor().to(torch.int64).clamp_(max=_SIDE - 1)
    return torch.where(values.abs() < SMALLEST, 0, torch.where(values < 0, -steps, steps)) + _SIDE


def centres() -> torch.Tensor:
    """The value that stands for each bin, within ACCURACY of all that it holds; float64[BINS], ascending."""
    positive = SMALLEST * _GROWTH ** torch.arange(1, _SIDE + 1, dtype=torch.float64) * 2 / (1 + _GROWTH)
    return torch.cat([-positive.flip(0), torch.zeros(1, dtype=torch.float64), positive])


def quantiles(counts: torch.Tensor, shares: Sequence[float]) -> list[float]:
    """What `share` of the counted values do not exceed, for each share; counts int64[BINS], not all zero.

    The value of rank ceil(share * n), counted from one: no interpolation.
    """
    below = counts.cumsum(0)
    n = int(below[-1])
    ranks = torch.tensor([min(n, max(1, math.ceil(share * n - 1e-9))) for share in shares])
    return [float(value) for value in centres()[torch.searchsorted(below, ranks)]]


def regroup(counts: torch.Tensor, edges: Sequence[float]) -> tuple[list[int], int, int]:
    """The counts between ascending `edges`, below the first and from the last on.

    A bin counts where its centre lies, so an edge is right to within ACCURACY.
    """
    place = torch.bucketize(centres(), torch.tensor(edges, dtype=torch.float64), right=True)
    found = torch.zeros(len(edges) + 1, dtype=torch.int64).index_add_(0, place, counts).tolist()
    return found[1:-1], found[0], found[-1]
