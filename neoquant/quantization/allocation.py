"""Mixed precision to order: which of several grids each layer goes on, for the least loss that a size allows.

What a layer adds to the loss on a grid is foreseen to second order, 1/4 tr(K E H Eᵀ), with the error E that GPTQ
leaves, the Hessian H of the layer's inputs and K of its outputs (see `calibration.loss_hessian`): half a
Kronecker-factored Hessian of the KL divergence from the unquantized model. Layers are taken to add up. The choice is
then a multiple-choice knapsack, solved exactly by dynamic programming over the size.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from neoquant.calibration.block_forward import BlockForward
from neoquant.calibration.dataset import Calibration
from neoquant.calibration.memory import estimate_memory
from neoquant.checkpoint import Checkpoint
from neoquant.errors import RequestError, locate
from neoquant.grids import Affine, Grid
from neoquant.model.config import GPTNeoConfig
from neoquant.progress import SILENT, Progress
from neoquant.quantization.plan import Plan, make_plan
from neoquant.quantization.recipe import Recipe
from neoquant.quantization.resume import ResumableRun
from neoquant.quantization.reverse import look_at_unquantized, methods_of
from neoquant.quantization.sequential import embed, read_block, require_calibration
from neoquant.quantizers import Gptq, Hessian

GRIDS: tuple[Affine, ...] = (Affine(2, 32), Affine(3, 64), Affine(4, 64), Affine(8, 128))
"""What layers may go on."""

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
    """

    layers: tuple[str, ...]
    grids: tuple[Grid, ...]
    sizes: Tensor
    losses: Tensor
    weights: int

    def bits(self, size: int) -> float:
        """A weight of the linears, of so many bytes together."""
        return 8 * size / self.weights


@dataclass(frozen=True)
class Allocation:
    """A grid for each layer: `choice` by its number, and what they take and are foreseen to add together."""

    candidates: Candidates
    choice: tuple[int, ...]

    @property
    def size(self) -> int:
        return int(sum(self.candidates.sizes[layer, grid] for layer, grid in enumerate(self.choice)))

    @property
    def bits(self) -> float:
        return self.candidates.bits(self.size)

    @property
    def loss(self) -> float:
        return float(sum(self.candidates.losses[layer, grid] for layer, grid in enumerate(self.choice)))

    def recipe(self) -> Recipe:
        """A rule for each layer, GPTQ, in neoquant's own format, which holds several grids."""
        rules = []
        for layer, number in zip(self.candidates.layers, self.choice, strict=True):
            described = self.candidates.grids[number].describe()
            rules.append({"match": layer, "type": described.pop("name"), **described, **QUANTIZER})
        said = f"{self.bits:.3f} bits a weight of the linears, foreseen to add {self.loss:.3g} nats a token of KL"
        name = f"mixed-{self.bits:.2f}-bits"
        return Recipe.parse({"name": name, "description": said, "format": "neoquant", "rules": rules})


def allocate(candidates: Candidates, budget: int) -> Allocation:
    """The grids of least loss that take at most `budget` bytes.

    Raises:
        RequestError: even the smallest grids take more.
    """
    least = candidates.sizes.min(1).values
    room = budget - int(least.sum())
    if room < 0:
        smallest, largest = (candidates.bits(int(each.values.sum())) for each in _extremes(candidates.sizes))
        raise RequestError(
            f"{candidates.bits(budget):.3f} bits a weight: legal is {smallest:.3f} to {largest:.3f}, "
            "what the smallest and the largest grids take"
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


def foresee(
    checkpoint: Checkpoint,
    calibration: Calibration,
    grids: Sequence[Grid] = GRIDS,
    *,
    max_memory: int | None = None,
    progress: Progress = SILENT,
) -> Candidates:
    """What each layer would take and add on each grid, by rounding it there on the unquantized model's inputs.

    Raises RequestError where the checkpoint or the calibration does not serve.
    """
    plans = [make_plan(checkpoint, _uniform(grid)) for grid in grids]
    require_calibration(plans[0], calibration)
    rows = {row.layer: row for row in plans[0].rows if row.is_linear}
    found = dict(_losses(checkpoint, plans[0], calibration, grids, max_memory, progress))
    sizes = [{row.layer: row.out_bytes for row in plan.rows if row.is_linear} for plan in plans]
    return Candidates(
        tuple(rows),
        tuple(grids),
        torch.tensor([[by_layer[layer] for by_layer in sizes] for layer in rows]),
        torch.tensor([found[layer] for layer in rows], dtype=torch.float64),
        sum(row.source.numel for row in rows.values()),
    )


def _uniform(grid: Grid) -> Recipe:
    described = grid.describe()
    rule = {"match": "*", "type": described.pop("name"), **described, "quantizer": Gptq.name, "objective": "model"}
    return Recipe.parse({"name": "uniform", "format": "neoquant", "rules": [{**rule, "correction": 0.0}]})


def _losses(
    checkpoint: Checkpoint,
    plan: Plan,
    calibration: Calibration,
    grids: Sequence[Grid],
    max_memory: int | None,
    progress: Progress,
) -> Iterator[tuple[str, list[float]]]:
    """Each layer with what it adds on each grid."""
    config = GPTNeoConfig.from_dict(checkpoint.config)
    rows, length = calibration.ids.shape
    memory = estimate_memory(config, rows, length, max_memory, methods_of(plan))
    with tempfile.TemporaryDirectory(prefix="neoquant-") as folder, ResumableRun(Path(folder) / "model") as run:
        run.begin({}, config.num_layers)
        look_at_unquantized(checkpoint, plan, calibration, memory, run, progress)
        with torch.inference_mode(), progress.task("foreseeing", total=config.num_layers) as advance:
            hidden = run.new_hidden_states((rows, length, config.hidden_size), memory.spilled)
            embed(checkpoint, calibration.ids, hidden)
            forward = BlockForward(hidden, config.window_size, memory.keeps_inner)
            for number in range(config.num_layers):
                yield from _losses_of_block(checkpoint, plan, config, number, forward, run, grids)
                advance(1)
            hidden.close()
        run.remove()


def _losses_of_block(
    checkpoint: Checkpoint,
    plan: Plan,
    config: GPTNeoConfig,
    number: int,
    forward: BlockForward,
    run: ResumableRun,
    grids: Sequence[Grid],
) -> Iterator[tuple[str, list[float]]]:
    rows = {row.name_in_block.removesuffix(".weight"): row for row in plan.rows if row.block == number}
    block = read_block(checkpoint, list(rows.values()), config, number)
    output_hessians = run.output_hessians(number)
    for stage in forward.stages(block):
        hessian = Hessian(stage.in_features)
        for batch in stage.inputs():
            hessian.add(batch)
        for name, linear in stage.linears.items():
            with locate(rows[name].name):
                losses = [_loss(linear.weight.detach(), grid, hessian, output_hessians[name]) for grid in grids]
            yield rows[name].layer, losses


def _loss(weight: Tensor, grid: Grid, hessian: Hessian, output_hessian: Tensor) -> float:
    """Nats a token that weight[O, I] is foreseen to add on a grid."""
    q = Gptq(objective="model", correction=0.0).quantize(weight, grid, hessian, output_hessian)
    error = q.dequantize(torch.float32) - weight
    of_heads = error.view(len(output_hessian), -1, error.shape[1])
    return float(((output_hessian @ of_heads).view_as(error) * (error @ hessian.matrix)).sum()) / 4
