"""Heat maps of the page: candidates over subsets, and layers over blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from neoquant.evaluation.inspection_result import Inspection
from neoquant.evaluation.result import Candidate, Change, Comparison
from neoquant.model.names import BLOCK_LINEARS
from neoquant.report.charts import percent
from neoquant.report.formatting import (
    NONE,
    change_interval,
    divergence,
    divergence_interval,
    nats_interval,
    signed,
    suite_label,
)
from neoquant.report.layers import Measure, grid_text, measures_of
from neoquant.report.page_elements import Cell, Heat, HeatRow
from neoquant.report.shades import anchored
from neoquant.report.subsets import subset_names
from neoquant.report.verdict import DIVERGENCE, TOLERANCE
from neoquant.sizes import plural


def subset_heats(result: Comparison, short: Mapping[str, str]) -> list[Heat]:
    """Each candidate's KL (where all have it) and change of perplexity on each subset; `short`: name -> heading."""
    candidates = result.candidates
    if not candidates:
        return []
    names, _ = subset_names(result.reference)
    headings = [short[candidate.evaluation.model.name] for candidate in candidates]
    heats = []
    if all(candidate.total.kl is not None for candidate in candidates):
        cells = [[_divergence_cell(change) for change in column] for column in map(_changes, candidates)]
        caption = f"KL divergence, mean nats a token; the bound is {DIVERGENCE:g}"
        heats.append(_heat(caption, names, headings, cells))
    cells = [[_perplexity_cell(change) for change in column] for column in map(_changes, candidates)]
    caption = f"Change of perplexity, %; the bound is {100 * TOLERANCE:g} %"
    return [*heats, _heat(caption, names, headings, cells)]


def inspection_note(result: Inspection) -> str:
    """On which text layers were measured, and what the whole model loses there."""
    together = result.together
    note = (
        f"On {plural(result.windows, 'window')} of {suite_label(result.suite)}, {plural(result.tokens, 'token')}. "
        f"The whole model there, with 95 % intervals: KL {divergence_interval(together)}, change "
        f"{nats_interval(together.nats_per_token, together.low, together.high)} nats a token."
    )
    losses = [layer.loss for layer in result.layers if layer.loss]
    if losses:
        note += f" The KL of the layers alone add up to {divergence(sum(loss.kl for loss in losses))}."
    return note


def layer_heats(result: Inspection) -> list[Heat]:
    """Blocks down, projections across, the most telling first."""
    return [_layer_heat(result, measure) for measure in reversed(measures_of(result))]


def _changes(candidate: Candidate) -> list[Change]:
    return [*candidate.subsets, candidate.total]


def _divergence_cell(change: Change) -> Cell:
    title = f"{divergence_interval(change)} nats a token"
    return _anchored_cell(change.kl or 0.0, DIVERGENCE, divergence, title)


def _perplexity_cell(change: Change) -> Cell:
    title = f"{change_interval(change)} nats a token"
    return _anchored_cell(change.nats_per_token, math.log1p(TOLERANCE), lambda v: signed(percent(v), 2), title)


def _anchored_cell(value: float, bound: float, write: Callable[[float], str], title: str) -> Cell:
    return Cell(write(value), f"{anchored(bound)(value):.2f}", title, value >= bound)


def _heat(caption: str, names: Sequence[str], headings: Sequence[str], columns: Sequence[Sequence[Cell]]) -> Heat:
    rows = [HeatRow(name, list(cells)) for name, cells in zip(names, zip(*columns, strict=True), strict=True)]
    return Heat(caption, "subset", list(headings), [*rows[:-1], rows[-1]._replace(total=True)])


def _layer_heat(result: Inspection, measure: Measure) -> Heat:
    shade = measure.shade(result.layers)
    rows = []
    for block in sorted({layer.block for layer in result.layers}):
        row = {layer.projection: layer for layer in result.layers if layer.block == block}
        cells = []
        for name in BLOCK_LINEARS:
            layer = row.get(name)
            value = measure.value(layer) if layer is not None else None
            if layer is None or value is None or not layer.weight_error:
                cells.append(Cell(NONE, title="not changed"))
                continue
            over = measure.bound is not None and value >= measure.bound
            title = f"{layer.name}: {grid_text(layer)}"
            cells.append(Cell(measure.write(value), f"{shade(value):.2f}", title, over))
        rows.append(HeatRow(f"{block} {next(iter(row.values())).attention}", cells))
    return Heat(measure.title, "block", [name.rpartition(".")[2] for name in BLOCK_LINEARS], rows)
