"""An inspection for a terminal: heat maps of figures over layer x projection, and the layers that cost most."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from neoquant.evaluation.inspection_result import Inspection, Layer, Loss
from neoquant.grids import grid_from_dict
from neoquant.model.names import BLOCK_LINEARS
from neoquant.report.formatting import NONE, divergence, grid_label, nats_interval, share, suite_words

WORST = 10

# A ramp from nearly black to yellow that grows evenly lighter, so that it also orders the cells in shades of grey; the
# ink on it is white below the middle and black above. (Anchors of matplotlib's "cividis".)
RAMP = ((0, 34, 78), (18, 53, 112), (59, 73, 108), (87, 93, 109), (112, 113, 115), (138, 134, 120), (165, 156, 116),
        (195, 179, 105), (225, 204, 85), (254, 232, 56))  # fmt: skip


class Measure(NamedTuple):
    """One heat map: what a cell holds, and how it is written."""

    title: str
    value: Callable[[Layer], float | None]
    write: Callable[[float], str]


def measures_of(result: Inspection) -> list[Measure]:
    """The heat maps that an inspection has figures for, the most telling last."""
    measures = [
        Measure("weight error, % of the weight's mean square", lambda layer: layer.weight_error, share),
        Measure("output error, % of the output's mean square", lambda layer: layer.output_error, share),
    ]
    if any(layer.loss for layer in result.layers):
        measures.append(
            Measure(
                "KL with this layer alone quantized, nats a token",
                lambda layer: layer.loss.kl if layer.loss else None,
                divergence,
            )
        )
    return measures


def inspection_table(result: Inspection) -> RenderableType:
    """Everything an inspection says, for a terminal of 80 columns or more."""
    parts: list[RenderableType] = [
        Text(f"{result.model.name} against {result.base.name}, layer by layer"),
        Text(f"{suite_words(result.suite)}: {result.windows} windows, {result.tokens:,} tokens", style="dim"),
    ]
    for measure in measures_of(result):
        parts += [Text(), Text(measure.title, style="bold"), heat_table(result.layers, measure)]
    if costliest(result):
        parts += [Text(), Text("costliest layers", style="bold"), worst_table(result)]
    else:
        parts += [Text(), Text("not one layer differs")]
    return Group(*parts, Text(), Text(_total(result)))


def heat_table(layers: Sequence[Layer], measure: Measure) -> Table:
    """Blocks down, projections across; each cell its figure, on a ground that is lighter the larger the figure."""
    table = Table(box=None, header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("block", no_wrap=True)
    for name in BLOCK_LINEARS:
        table.add_column(name.rpartition(".")[2], justify="right", no_wrap=True)
    shade = shades([value for layer in layers if (value := measure.value(layer)) is not None])
    for number in sorted({layer.block for layer in layers}):
        row = {layer.projection: layer for layer in layers if layer.block == number}
        cells = [_cell(row.get(name), measure, shade) for name in BLOCK_LINEARS]
        attention = next(iter(row.values())).attention
        table.add_row(Text(f"{number} {attention}"), *cells)
    return table


def shades(values: Sequence[float]) -> Callable[[float], float]:
    """Where a value lies between the least (0) and the largest (1), on a logarithmic scale; 0 and less are 0.

    The scale spans a factor of ten at least: what hardly differs shall not look as if it did.
    """
    positive = [value for value in values if value > 0]
    high = max(positive, default=1.0)
    low = min(*positive, high / 10) if positive else high / 10

    def shade(value: float) -> float:
        if value <= 0:
            return 0.0
        return math.log(value / low) / math.log(high / low)

    return shade


def costliest(result: Inspection, count: int = WORST) -> list[Layer]:
    """The layers whose quantization the loss feels most: by KL, or by output error where no loss was measured."""
    changed = [layer for layer in result.layers if layer.weight_error > 0]
    return sorted(changed, key=lambda layer: layer.loss.kl if layer.loss else layer.output_error, reverse=True)[:count]


def worst_table(result: Inspection) -> Table:
    """One line for each of the costliest layers."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("layer", no_wrap=True)
    table.add_column("grid", overflow="ellipsis", no_wrap=True)
    for heading in ("weight %", "output %", "KL", "Δ nats/token"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in costliest(result):
        table.add_row(
            f"h.{layer.block}.{layer.projection.rpartition('.')[2]}",
            grid_text(layer),
            share(layer.weight_error),
            share(layer.output_error),
            divergence(layer.loss.kl) if layer.loss else NONE,
            f"{layer.loss.nats_per_token:+.5f}" if layer.loss else NONE,
        )
    return table


def grid_text(layer: Layer) -> str:
    """The layer's grid in words."""
    return "not quantized" if layer.grid is None else grid_label(grid_from_dict(layer.grid))


def _cell(layer: Layer | None, measure: Measure, shade: Callable[[float], float]) -> Text:
    value = measure.value(layer) if layer is not None else None
    if value is None:
        return Text(NONE)
    if layer is not None and not layer.weight_error:
        return Text(f"{NONE} ", style="dim")
    ground = RAMP[round(shade(value) * (len(RAMP) - 1))]
    light = sum(ground) > 3 * 128
    style = Style(color="rgb(0,0,0)" if light else "rgb(255,255,255)", bgcolor="rgb({},{},{})".format(*ground))
    return Text(f" {measure.write(value)} ", style=style)


def _total(result: Inspection) -> str:
    together = result.together
    text = f"whole model: KL {divergence(together.kl)} nats a token, change {nats_interval(*_change(together))}"
    losses = [layer.loss for layer in result.layers if layer.loss]
    if losses:
        text += f"; the layers' KL alone add up to {divergence(sum(loss.kl for loss in losses))}"
    return text


def _change(loss: Loss) -> tuple[float, float | None, float | None]:
    return loss.nats_per_token, loss.low, loss.high
