"""What is kept of every scored token: sums by window, counts by subset, and the tokens of the largest divergence.

Nothing here depends on the order of the batches, or on the process that scored them: a window's sums are written by the
one batch that holds it, counts are integers, and of minima, maxima and divergent tokens the more extreme one stays. So
the accumulators of different batches merge into exactly the one that a single process would have filled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

import torch

from neoquant.evaluation.corpus import Corpus
from neoquant.evaluation.quantile_sketch import BUCKETS, bucket_indices

SUMS: Final = (
    *("nats", "hits", "kl", "kl_squares", "agreed", "loss_squares", "probability", "probability_squares"),
    "kl_maximum",
)
"""Summed over the tokens of a window; of the last one, the maximum."""

DISTRIBUTIONS: Final = ("divergence", "loss_change", "probability_change")
"""Counted in quantile sketches."""

LARGEST: Final = 20
"""Tokens of the largest divergence that are kept for each model, with the tokens around them."""

SEGMENT: Final = 64
"""Tokens of a document of which only the most divergent one is kept."""

CONTEXT_BEFORE, CONTEXT_AFTER = 64, 24  # tokens kept around a divergent one

_COUNTERS: Final = ("sums", "counts", "minima", "maxima")


class TokenScores(NamedTuple):
    """A model's predictions of N scored tokens: float64[N] each (the likeliest tokens float64[N, K]), on one device."""

    nats: torch.Tensor  # -log p(token)
    kl: torch.Tensor  # KL(reference || this model), nats
    top: torch.Tensor  # its K likeliest tokens, the likeliest first
    top_probability: torch.Tensor
    hit: torch.Tensor  # 1 where the likeliest token is the token itself


@dataclass(frozen=True)
class DivergentToken:
    """A token whose prediction diverges from the reference's, and the changes of the tokens around it."""

    kl: float
    unit: int
    position: int  # among the unit's scored tokens
    window: int
    index: int  # of the token in the window's ids
    nats: tuple[float, float]  # of the reference, of this model
    top: tuple[tuple[int, ...], tuple[int, ...]]  # their likeliest tokens
    top_probability: tuple[tuple[float, ...], tuple[float, ...]]
    start: int  # index in the window's ids of the first token of `changes` and `divergences`
    changes: tuple[float, ...]  # of -log p, nats
    divergences: tuple[float, ...]

    @property
    def rank(self) -> tuple[float, int, int]:
        """The largest divergence first; a total order, so that every order of merging keeps the same tokens."""
        return -self.kl, self.unit, self.position

    @property
    def segment(self) -> tuple[int, int]:
        """Of these, only one token is kept: the unit, and the number of the stretch of SEGMENT tokens in it."""
        return self.unit, self.position // SEGMENT


class Accumulator:
    """Sums, counts and divergent tokens of `models` models on the windows of `corpus`; the first is the reference."""

    def __init__(self, corpus: Corpus, models: int) -> None:
        windows = corpus.windows
        subsets = list(corpus.documents)
        self.subsets = torch.tensor([subsets.index(unit.subset) for unit in corpus.units])  # of each unit
        self.units = torch.tensor([window.unit for window in windows])  # of each window
        self.scored = torch.tensor([window.scored for window in windows])
        self.sums = torch.zeros(models, len(SUMS), len(windows), dtype=torch.float64)
        shape = (models - 1, len(DISTRIBUTIONS), len(subsets))
        self.counts = torch.zeros(*shape, BUCKETS, dtype=torch.int64)
        self.minima = torch.full(shape, torch.inf, dtype=torch.float64)
        self.maxima = torch.full(shape, -torch.inf, dtype=torch.float64)
        self.divergent: list[dict[tuple[int, int], DivergentToken]] = [{} for _ in range(models - 1)]  # by segment
        before = self.scored.cumsum(0) - self.scored
        starts = torch.zeros(len(corpus.units), dtype=torch.int64)
        starts.scatter_reduce_(0, self.units, before, "amin", include_self=False)
        self._first = (before - starts[self.units]).tolist()  # number in its unit of a window's first scored token
        self._lengths = [len(window.ids) for window in windows]

    def add(self, windows: Sequence[int], scores: Sequence[TokenScores]) -> None:
        """Count a batch: the numbers of its windows, and each model's scores of their tokens, in this order."""
        numbers = torch.tensor(windows)
        owners = torch.arange(len(windows)).repeat_interleave(self.scored[numbers])  # of each token, within the batch
        subsets = self.subsets[self.units[numbers]][owners]
        reference = scores[0]
        self._sum(0, 0, numbers, owners, reference.nats)
        self._sum(0, 1, numbers, owners, reference.hit)
        for model, other in enumerate(scores[1:]):
            loss = other.nats - reference.nats
            probability = other.nats.neg().exp() - reference.nats.neg().exp()
            agreed = (other.top[:, 0] == reference.top[:, 0]).double()
            amounts = (other.nats, other.hit, other.kl, other.kl**2, agreed, loss**2, probability, probability**2)
            for number, amount in enumerate(amounts):
                self._sum(model + 1, number, numbers, owners, amount)
            largest = torch.full((len(windows),), -torch.inf, dtype=torch.float64)
            self.sums[model + 1, -1, numbers] = largest.scatter_reduce_(0, owners, other.kl, "amax")
            for distribution, values in enumerate((other.kl, loss, probability)):
                buckets = bucket_indices(values) + BUCKETS * subsets
                self.counts[model, distribution].view(-1).index_add_(0, buckets, torch.ones_like(buckets))
                self.minima[model, distribution].scatter_reduce_(0, subsets, values, "amin")
                self.maxima[model, distribution].scatter_reduce_(0, subsets, values, "amax")
            self._keep_divergent(model, windows, reference, other)

    def merge(self, other: Accumulator) -> None:
        """Add what `other` counted, of other batches of the same corpus."""
        self.sums += other.sums  # where one has a window's sums, the other has zeros
        self.counts += other.counts
        self.minima = torch.minimum(self.minima, other.minima)
        self.maxima = torch.maximum(self.maxima, other.maxima)
        pairs = zip(self.divergent, other.divergent, strict=True)
        self.divergent = [_largest([*ours.values(), *theirs.values()]) for ours, theirs in pairs]

    def state(self) -> dict[str, Any]:
        """All that was counted, as tensors and plain values; `from_state` reads it."""
        divergent = [[asdict(token) for token in tokens.values()] for tokens in self.divergent]
        return {name: getattr(self, name) for name in _COUNTERS} | {"divergent": divergent}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Accumulator:
        """An accumulator to merge from: it has the counts, but not the corpus."""
        accumulator = cls.__new__(cls)
        for name in _COUNTERS:
            setattr(accumulator, name, state[name])
        accumulator.divergent = [
            _largest([DivergentToken(**{key: _frozen(value) for key, value in token.items()}) for token in tokens])
            for tokens in state["divergent"]
        ]
        return accumulator

    def by_unit(self, model: int, name: str) -> torch.Tensor:
        """A sum (or the maximum) for each unit: float64[units]."""
        values = self.sums[model, SUMS.index(name)]
        units = torch.zeros(len(self.subsets), dtype=torch.float64)
        if name == "kl_maximum":
            return units.scatter_reduce_(0, self.units, values, "amax")
        return units.index_add_(0, self.units, values)

    def largest_divergences(self, candidate: int) -> list[DivergentToken]:
        """The tokens where a candidate diverges from the reference the most, the largest KL first."""
        return list(self.divergent[candidate].values())

    def _sum(self, model: int, number: int, windows: torch.Tensor, owners: torch.Tensor, amount: torch.Tensor) -> None:
        self.sums[model, number, windows] = torch.zeros(len(windows), dtype=torch.float64).index_add_(0, owners, amount)

    def _keep_divergent(self, model: int, windows: Sequence[int], reference: TokenScores, other: TokenScores) -> None:
        """Keep the batch's most divergent tokens, of as many segments as are kept at all."""
        kept = self.divergent[model]
        least = list(kept.values())[-1].kl if len(kept) >= LARGEST else 0.0
        ends = self.scored[torch.tensor(windows)].cumsum(0)
        candidates = (other.kl >= max(least, 1e-6)).nonzero()[:, 0]
        found: list[DivergentToken] = []
        segments: set[tuple[int, int]] = set()
        for index in candidates[other.kl[candidates].argsort(descending=True)].tolist():
            if len(segments) >= LARGEST and float(other.kl[index]) < found[-1].kl:
                break
            row = int(torch.searchsorted(ends, index, right=True))
            found.append(self._divergent_token(windows[row], int(ends[row]), index, reference, other))
            segments.add(found[-1].segment)
        self.divergent[model] = _largest([*kept.values(), *found])

    def _divergent_token(
        self, window: int, end: int, index: int, reference: TokenScores, other: TokenScores
    ) -> DivergentToken:
        """Token `index` of a batch, in which the window's scored tokens end at `end`."""
        first = end - int(self.scored[window])
        around = slice(max(first, index - CONTEXT_BEFORE), min(end, index + CONTEXT_AFTER + 1))
        offset = self._lengths[window] - end  # from the number of a token in the batch to its index in the window
        return DivergentToken(
            kl=float(other.kl[index]),
            unit=int(self.units[window]),
            position=self._first[window] + index - first,
            window=window,
            index=offset + index,
            nats=(float(reference.nats[index]), float(other.nats[index])),
            top=(tuple(reference.top[index].int().tolist()), tuple(other.top[index].int().tolist())),
            top_probability=(
                tuple(reference.top_probability[index].tolist()),
                tuple(other.top_probability[index].tolist()),
            ),
            start=offset + around.start,
            changes=tuple((other.nats[around] - reference.nats[around]).tolist()),
            divergences=tuple(other.kl[around].tolist()),
        )


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _largest(tokens: Iterable[DivergentToken]) -> dict[tuple[int, int], DivergentToken]:
    """The LARGEST most divergent tokens, one a segment, by segment, the largest divergence first."""
    found: dict[tuple[int, int], DivergentToken] = {}
    for token in sorted(tokens, key=lambda token: token.rank):
        found.setdefault(token.segment, token)
    return dict(list(found.items())[:LARGEST])
