"""95 % intervals of how far predictions agree, from each document's sums: the statistics of the loss's own interval."""

from __future__ import annotations

from typing import TypedDict

import torch

from neoquant.evaluation.statistics import ConfidenceInterval, ratio_interval


class PredictionIntervals(TypedDict):
    """The fields of a `Change`; None for fewer than two documents."""

    agreement_low: float | None
    agreement_high: float | None
    kl_low: float | None
    kl_high: float | None


def kl_interval(kl: torch.Tensor, tokens: torch.Tensor) -> ConfidenceInterval | None:
    """The interval of the mean KL divergence of a token, which is never negative; float64[documents] each."""
    return _bounded(ratio_interval(kl, tokens), torch.inf)


def prediction_intervals(kl: torch.Tensor, agreed: torch.Tensor, tokens: torch.Tensor) -> PredictionIntervals:
    """Intervals from documents' summed KL (nats), tokens with the same top token, and tokens: float64[documents] each.

    Where differences are skewed, Student's interval may leave what is possible: ends are clipped to it.
    """
    divergence = kl_interval(kl, tokens)
    same = _bounded(ratio_interval(agreed, tokens), 1.0)
    return {
        "agreement_low": same.low if same else None,
        "agreement_high": same.high if same else None,
        "kl_low": divergence.low if divergence else None,
        "kl_high": divergence.high if divergence else None,
    }


def _bounded(interval: ConfidenceInterval | None, most: float) -> ConfidenceInterval | None:
    return interval and ConfidenceInterval(max(0.0, interval.low), min(most, interval.high))
