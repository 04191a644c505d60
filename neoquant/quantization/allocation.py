"""Mixed precision to order: which of several grids each layer goes on, for the least loss that a size allows.

What a layer adds to the loss on a grid is foreseen (`quantization.foreseeing`), and layers are taken to add up. The
choice is then a multiple-choice knapsack, solved exactly by dynamic programming over the size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from neoquant.errors import RequestError
from neoquant.grids import Grid
from neoquant.quantization.recipe import Recipe
from neoquant.quantizers import Gptq

QUANTIZER = {"quantizer": Gptq.name, "objective": "model", "correction": 0.5}
"""How layers are rounded once their grids are chosen."""

SLOTS = 1 << 17
"""Sizes that are told apart, at most: a size is otherwise rounded up, by as little of the whole."""

STEPS = 12
"""Points of the frontier that are shown."""


@dataclass(frozen=True)
class Candidates:
    """Layer by layer, what each of `grids` would take and add.

    layers  names of the linears
    sizes   bytes stored on each grid, int64[L, G]
    losses  nats a token that it is foreseen to add, float64[L, G]
    weights how many the layers have together
    tables  what embeddings may be, as a recipe calls it: with them, sizes and losses have one row more, of the first so
            many columns; the others hold its smallest size, at an infinite loss
    """

    layers: tuple[str, ...]
    grids: tuple[Grid, ...]
    sizes: Tensor
    losses: Tensor
    weights: int
    tables: tuple[str, ...] = ()

    def bits(self, size: int) -> float:
        """A weight of the linears, of so many bytes together."""
        return 8 * size / self.weights

    def said(self, *sizes: int) -> str:
        """Sizes in words: bits a weight of the linears, and bytes where embeddings take part."""
        if self.tables:
            return f"{' to '.join(f'{size:,}' for size in sizes)} bytes of the linears and embeddings"
        return f"{' to '.join(f'{self.bits(size):.3f}' for size in sizes)} bits a weight"

    def with_tables(self, sizes: dict[str, int], losses: dict[str, float]) -> Candidates:
        """The same, and embeddings, which take and add so much, by what a recipe calls it."""
        missing = len(self.grids) - len(sizes)
        assert sizes.keys() == losses.keys() and missing >= 0
        size = [*sizes.values(), *[min(sizes.values())] * missing]
        loss = [*losses.values(), *[math.inf] * missing]
        return replace(
            self,
            sizes=torch.cat([self.sizes, torch.tensor([size])]),
            losses=torch.cat([self.losses, torch.tensor([loss], dtype=torch.float64)]),
            tables=tuple(sizes),
        )


@dataclass(frozen=True)
class Allocation:
    """A grid for each layer, and for embeddings where they take part: `choice` by its number, and what they take and
    are foreseen to add together."""

    candidates: Candidates
    choice: tuple[int, ...]

    @property
    def of_linears(self) -> tuple[int, ...]:
        """The choice without embeddings."""
        return self.choice[: len(self.candidates.layers)]

    @property
    def embeddings(self) -> str | None:
        """What they are, as a recipe calls it, where they take part."""
        tables = self.candidates.tables
        return tables[self.choice[-1]] if tables else None

    @property
    def size(self) -> int:
        return self._size(self.choice)

    @property
    def bits(self) -> float:
        """A weight of the linears."""
        return self.candidates.bits(self._size(self.of_linears))

    def _size(self, choice: tuple[int, ...]) -> int:
        return int(sum(self.candidates.sizes[layer, grid] for layer, grid in enumerate(choice)))

    @property
    def loss(self) -> float:
        return float(sum(self.candidates.losses[layer, grid] for layer, grid in enumerate(self.choice)))

    def recipe(self) -> Recipe:
        """A rule for each layer, GPTQ, in neoquant's own format, which holds several grids."""
        rules = []
        for layer, number in zip(self.candidates.layers, self.of_linears, strict=True):
            grid = self.candidates.grids[number]
            described = {"bits": grid.bits, **grid.describe()}
            rules.append({"match": layer, "type": described.pop("name"), **described, **QUANTIZER})
        said = f"{self.bits:.3f} bits a weight of the linears, foreseen to add {self.loss:.3g} nats a token of KL"
        name = f"mixed-{self.bits:.2f}-bits"
        tables = {} if self.embeddings is None else {"embeddings": self.embeddings}
        return Recipe.parse({"name": name, "description": said, "format": "neoquant", **tables, "rules": rules})


def allocate(candidates: Candidates, budget: int) -> Allocation:
    """The grids of least loss that take at most `budget` bytes.

    Raises:
        RequestError: even the smallest grids take more.
    """
    least = candidates.sizes.min(1).values
    room = budget - int(least.sum())
    if room < 0:
        extremes = candidates.said(*(int(each.values.sum()) for each in _extremes(candidates.sizes)))
        raise RequestError(
            f"{candidates.said(budget)}: legal is {extremes}, what the smallest and the largest grids take"
        )
    extra = candidates.sizes - least[:, None]
    room = min(room, int(extra.max(1).values.sum()))
    unit = max(math.gcd(*extra.flatten().tolist()) or 1, -(room // -SLOTS), 1)
    costs = -(extra // -unit)  # rounded up: what is chosen fits
    return Allocation(candidates, tuple(_knapsack(costs, candidates.losses.double(), room // unit)))


def _extremes(sizes: Tensor) -> tuple[torch.return_types.min, torch.return_types.max]:
    return sizes.min(1), sizes.max(1)


def _knapsack(costs: Tensor, losses: Tensor, room: int) -> list[int]:
    """For each row one column, of the least sum of losses[L, G] at a sum of costs int64[L, G] of at most `room`."""
    best = torch.zeros(room + 1, dtype=torch.float64)  # of the rows so far, by what they may cost
    chosen = torch.zeros(len(costs), room + 1, dtype=torch.uint8)
    for row, (cost, loss) in enumerate(zip(costs.tolist(), losses.tolist(), strict=True)):
        found = torch.full_like(best, torch.inf)
        for column, (more, added) in enumerate(zip(cost, loss, strict=True)):
            if more > room:
                continue
            tried = torch.full_like(best, torch.inf)
            tried[more:] = best[: room + 1 - more] + added
            better = tried < found
            found[better], chosen[row, better] = tried[better], column
        best = found
    choice, left = [], room
    for row in reversed(range(len(costs))):
        choice.append(int(chosen[row, left]))
        left -= int(costs[row, choice[-1]])
    return choice[::-1]


def frontier(candidates: Candidates, steps: int = STEPS) -> list[Allocation]:
    """The best allocations at sizes evenly between the smallest and the largest grids."""
    low, high = (int(each.values.sum()) for each in _extremes(candidates.sizes))
    return [allocate(candidates, low + (high - low) * step // (steps - 1)) for step in range(steps)]
