"""What is kept of every scored token: sums by window, counts by subset, and the tokens where models differ the most.

Nothing here depends on the order in which batches come, or on where they were scored: a window's sums are written by
the one batch that holds it, counts are integers, and of extremes the more extreme one stays. So tallies of different
batches merge into exactly the tally that one process would have made of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

import torch

from neoquant.evaluation.corpus import Corpus
from neoquant.evaluation.quantile_sketch import BINS, bins

SUMS: Final = (
    *("nats", "hits", "kl", "kl_squares", "agreed", "loss_squares", "probability", "probability_squares"),
    "kl_maximum",
)
"""What is added up for a window (the last: the largest)."""

SPREADS: Final = ("divergence", "loss_change", "probability_change")
"""What is counted for quantiles."""

WORST: Final = 20
"""Tokens that are kept with their surroundings, for each model."""

STRETCH: Final = 64
"""Of so many tokens of a document, only the worst one is kept."""

BEFORE, AFTER = 64, 24  # tokens kept around


_COUNTED: Final = ("sums", "counts", "minima", "maxima")


class Measures(NamedTuple):
    """What a model gives for N scored tokens: float64[N] each (the likeliest tokens float64[N, K]), on one device."""

    nats: torch.Tensor  # -log p(token)
    kl: torch.Tensor  # KL(reference || this model), nats
    top: torch.Tensor  # its K likeliest tokens, the likeliest first
    top_probability: torch.Tensor
    hit: torch.Tensor  # 1 where the likeliest token is the one that comes


@dataclass(frozen=True)
class Peak:
    """A token where a model differs from the reference, and the change of those around it, from number `start` on."""

    kl: float
    unit: int
    position: int  # among the unit's scored tokens
    window: int
    index: int  # of the token in the window's ids
    nats: tuple[float, float]  # of the reference, of this model
    top: tuple[tuple[int, ...], tuple[int, ...]]  # their likeliest tokens
    top_probability: tuple[tuple[float, ...], tuple[float, ...]]
    start: int  # index in the window's ids of the first of what follows
    changes: tuple[float, ...]
    divergences: tuple[float, ...]

    @property
    def rank(self) -> tuple[float, int, int]:
        """The worst first; a total order, so that whoever merges finds the same ones."""
        return -self.kl, self.unit, self.position


class Tally:
    """Sums, counts and peaks of `models` models on the windows of `corpus`; the first model is the reference."""

    def __init__(self, corpus: Corpus, models: int) -> None:
        windows = corpus.windows
        subsets = list(corpus.documents)
        self.subsets = torch.tensor([subsets.index(unit.subset) for unit in corpus.units])  # of each unit
        self.units = torch.tensor([window.unit for window in windows])  # of each window
        self.scored = torch.tensor([window.scored for window in windows])
        self.sums = torch.zeros(models, len(SUMS), len(windows), dtype=torch.float64)
        shape = (models - 1, len(SPREADS), len(subsets))
        self.counts = torch.zeros(*shape, BINS, dtype=torch.int64)
        self.minima = torch.full(shape, torch.inf, dtype=torch.float64)
        self.maxima = torch.full(shape, -torch.inf, dtype=torch.float64)
        self.peaks: list[dict[tuple[int, int], Peak]] = [{} for _ in range(models - 1)]
        before = self.scored.cumsum(0) - self.scored
        starts = torch.zeros(len(corpus.units), dtype=torch.int64)
        starts.scatter_reduce_(0, self.units, before, "amin", include_self=False)
        self._first = (before - starts[self.units]).tolist()  # number in its unit of a window's first scored token
        self._lengths = [len(window.ids) for window in windows]

    def add(self, windows: Sequence[int], measured: Sequence[Measures]) -> None:
        """Count a batch: the numbers of its windows, and what each model gives for their tokens, in this order."""
        numbers = torch.tensor(windows)
        owners = torch.arange(len(windows)).repeat_interleave(self.scored[numbers])  # of each token, within the batch
        subsets = self.subsets[self.units[numbers]][owners]
        reference = measured[0]
        p = reference.nats.neg().exp()
        self._sum(0, 0, numbers, owners, reference.nats)
        self._sum(0, 1, numbers, owners, reference.hit)
        for model, other in enumerate(measured[1:]):
            loss, probability = other.nats - reference.nats, other.nats.neg().exp() - p
            agreed = (other.top[:, 0] == reference.top[:, 0]).double()
            amounts = (other.nats, other.hit, other.kl, other.kl**2, agreed, loss**2, probability, probability**2)
            for number, amount in enumerate(amounts):
                self._sum(model + 1, number, numbers, owners, amount)
            largest = torch.full((len(windows),), -torch.inf, dtype=torch.float64)
            self.sums[model + 1, -1, numbers] = largest.scatter_reduce_(0, owners, other.kl, "amax")
            for spread, values in enumerate((other.kl, loss, probability)):
                places = bins(values) + BINS * subsets
                self.counts[model, spread].view(-1).index_add_(0, places, torch.ones_like(places))
                self.minima[model, spread].scatter_reduce_(0, subsets, values, "amin")
                self.maxima[model, spread].scatter_reduce_(0, subsets, values, "amax")
            self._keep_worst(model, windows, reference, other, loss)

    def merge(self, other: Tally) -> None:
        """Take over what `other` counted, of other batches of the same corpus."""
        self.sums += other.sums  # where one has a window's sums, the other has zeros
        self.counts += other.counts
        self.minima = torch.minimum(self.minima, other.minima)
        self.maxima = torch.maximum(self.maxima, other.maxima)
        for peaks, others in zip(self.peaks, other.peaks, strict=True):
            for key, peak in others.items():
                if key not in peaks or peak.rank < peaks[key].rank:
                    peaks[key] = peak
        self.peaks = [_best(peaks) for peaks in self.peaks]

    def state(self) -> dict[str, Any]:
        """All that was counted, as tensors and plain values; `of_state` takes it back."""
        peaks = [[asdict(peak) for peak in peaks.values()] for peaks in self.peaks]
        return {name: getattr(self, name) for name in _COUNTED} | {"peaks": peaks}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Tally:
        """A tally to merge from: it knows what was counted, and not of which corpus."""
        tally = cls.__new__(cls)
        for name in _COUNTED:
            setattr(tally, name, state[name])
        tally.peaks = []
        for peaks in state["peaks"]:
            made = [Peak(**{key: _frozen(value) for key, value in peak.items()}) for peak in peaks]
            tally.peaks.append({(peak.unit, peak.position // STRETCH): peak for peak in made})
        return tally

    def by_unit(self, model: int, name: str) -> torch.Tensor:
        """A sum (or the maximum) for each unit: float64[units]."""
        values = self.sums[model, SUMS.index(name)]
        units = torch.zeros(len(self.subsets), dtype=torch.float64)
        if name == "kl_maximum":
            return units.scatter_reduce_(0, self.units, values, "amax")
        return units.index_add_(0, self.units, values)

    def worst(self, candidate: int) -> list[Peak]:
        """The tokens where a candidate differs from the reference the most, the worst first."""
        return sorted(self.peaks[candidate].values(), key=lambda peak: peak.rank)

    def _sum(self, model: int, number: int, windows: torch.Tensor, owners: torch.Tensor, amount: torch.Tensor) -> None:
        self.sums[model, number, windows] = torch.zeros(len(windows), dtype=torch.float64).index_add_(0, owners, amount)

    def _keep_worst(
        self, model: int, windows: Sequence[int], reference: Measures, other: Measures, loss: torch.Tensor
    ) -> None:
        peaks = self.peaks[model]
        least = sorted(peak.kl for peak in peaks.values())[-WORST] if len(peaks) >= WORST else 0.0
        ends = self.scored[torch.tensor(windows)].cumsum(0)
        places = (other.kl >= max(least, 1e-6)).nonzero()[:, 0]
        found: set[tuple[int, int]] = set()
        last = float("inf")
        for place in places[other.kl[places].argsort(descending=True)].tolist():
            if len(found) >= WORST and other.kl[place] < last:
                break
            last = float(other.kl[place])
            row = int(torch.searchsorted(ends, place, right=True))
            window = windows[row]
            first = int(ends[row]) - int(self.scored[window])  # place of the window's first scored token
            position = self._first[window] + place - first
            key = (int(self.units[window]), position // STRETCH)
            start, end = max(first, place - BEFORE), min(int(ends[row]), place + AFTER + 1)
            peak = Peak(
                kl=float(other.kl[place]),
                unit=key[0],
                position=position,
                window=window,
                index=self._lengths[window] - int(ends[row]) + place,
                nats=(float(reference.nats[place]), float(other.nats[place])),
                top=(tuple(reference.top[place].int().tolist()), tuple(other.top[place].int().tolist())),
                top_probability=(
                    tuple(reference.top_probability[place].tolist()),
                    tuple(other.top_probability[place].tolist()),
                ),
                start=self._lengths[window] - int(ends[row]) + start,
                changes=tuple(loss[start:end].tolist()),
                divergences=tuple(other.kl[start:end].tolist()),
            )
            found.add(key)
            if key not in peaks or peak.rank < peaks[key].rank:
                peaks[key] = peak
        self.peaks[model] = _best(peaks)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _best(peaks: dict[tuple[int, int], Peak]) -> dict[tuple[int, int], Peak]:
    return dict(sorted(peaks.items(), key=lambda item: item[1].rank)[:WORST])
