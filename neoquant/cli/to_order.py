"""Mixed precision to order, by `--target-bits` or `--target-size`: the recipe, and the frontier that it lies on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from neoquant.cli.recipes import RecipeOptions, refuse_rule_options
from neoquant.cli.terminal import Terminal
from neoquant.errors import RequestError
from neoquant.sizes import parse_size

if TYPE_CHECKING:
    from neoquant.calibration.dataset import Calibration
    from neoquant.quantization.allocation import Allocation, Candidates
    from neoquant.quantization.recipe import Recipe

HOLDERS = ("auto", "neoquant", "packed")
"""Formats that hold several grids in one checkpoint."""


@dataclass(frozen=True)
class SizeTarget:
    """What a model is to take: bits for each weight of the linears, or bytes of its weight files."""

    bits: float | None
    size: int | None

    @classmethod
    def of(cls, bits: float | None, size: str | None, device: str, options: RecipeOptions) -> SizeTarget | None:
        """From the options as typed; None where neither is stated. Raises RequestError for what does not go with it."""
        if bits is None and size is None:
            return None
        said = "--target-bits" if bits is not None else "--target-size"
        if bits is not None and size is not None:
            raise RequestError("--target-bits and --target-size both say how large: give one of them")
        if bits is not None and not (math.isfinite(bits) and bits > 0):
            raise RequestError(f"--target-bits {bits:g}: give bits a weight, like 3.2")
        if options.recipe is not None:
            raise RequestError(f"{said} decides the grids, so --recipe cannot be given with it")
        refuse_rule_options(options, said)
        if options.keep:
            raise RequestError(f"{said} decides about every layer, so --keep cannot be given with it")
        if device != "cpu":
            raise RequestError(f"{said} computes gradients, on the CPU: leave --device {device} out")
        if not options.calibrated:
            raise RequestError(f"{said} needs calibration samples: name their text with --calibration")
        if options.format not in (None, *HOLDERS):
            raise RequestError(
                f"{said} puts layers on different grids, which format {options.format} does not hold: "
                'leave --format out, or take "neoquant"'
            )
        return cls(bits, None if size is None else parse_size(size, said))


def recipe_to_order(
    source: str | Path,
    revision: str | None,
    target: SizeTarget,
    samples: Calibration,
    options: RecipeOptions,
    max_memory: int | None,
    terminal: Terminal,
) -> Recipe:
    """The recipe of least foreseen loss that meets the target. Shows the frontier that it lies on."""
    from neoquant.checkpoint import open_checkpoint
    from neoquant.quantization.allocation import allocate
    from neoquant.quantization.foreseeing import foresee
    from neoquant.quantization.plan import make_plan

    embeddings = target.size is not None and options.embeddings is None
    with open_checkpoint(source, revision=revision, progress=terminal.progress) as checkpoint:
        candidates = foresee(
            checkpoint, samples, embeddings=embeddings, max_memory=max_memory, progress=terminal.progress
        )
        if target.bits is not None:
            chosen = allocate(candidates, int(target.bits * candidates.weights / 8))
        else:
            assert target.size is not None

            def besides(made: Allocation) -> int:
                """Bytes of the weight files that are of no layer."""
                return make_plan(checkpoint, _with_fields(made.recipe(), options)).weights_bytes - made.size

            smallest = allocate(candidates, int(candidates.sizes.min(1).values.sum()))
            budget = target.size - besides(smallest)
            chosen = allocate(candidates, budget)
            while (over := chosen.size + besides(chosen) - target.size) > 0:  # its tensors have longer headers
                budget -= over
                chosen = allocate(candidates, budget)
    show_frontier(candidates, chosen, terminal)
    return _with_fields(chosen.recipe(), options)


def _with_fields(recipe: Recipe, options: RecipeOptions) -> Recipe:
    """The recipe with what is stated beside its rules."""
    return type(recipe).parse({**recipe.model_dump(exclude_unset=True), **options.fields, "format": "neoquant"})


def show_frontier(candidates: Candidates, chosen: Allocation, terminal: Terminal) -> None:
    """Print the least loss that is foreseen at each size, with the chosen one among them."""
    from neoquant.quantization.allocation import frontier
    from neoquant.report.split_table import Column, SplitTable
    from neoquant.sizes import size

    points = sorted([*frontier(candidates), chosen], key=lambda point: point.size)
    most = max(math.log1p(1e4 * point.loss) for point in points) or 1.0
    columns = [
        Column("with embeddings" if candidates.tables else "linears", [size(point.size) for point in points]),
        Column("KL foreseen", [f"{point.loss:.3g}" for point in points]),
        Column("", ["#" * max(1, round(24 * math.log1p(1e4 * p.loss) / most)) for p in points], "left"),
        *(
            Column(grid.label, [str(point.of_linears.count(number)) for point in points])
            for number, grid in enumerate(candidates.grids)
        ),
    ]
    if candidates.tables:
        columns.append(Column("embeddings", [str(point.embeddings) for point in points]))
    names = [f"{point.bits:.3f}{' *' * (point is chosen)}" for point in points]
    terminal.show(
        "Layers by their grids at the least KL divergence that is foreseen, nats a token; * is what is asked for",
        SplitTable("bits", names, columns),
    )
