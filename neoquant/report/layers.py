"""An inspection for a terminal: heat maps of figures over layer x projection, and the layers that lose most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.style import Style
from rich.text import Text

from neoquant.evaluation.inspection_result import Inspection, Layer, Loss
from neoquant.grids import grid_from_dict
from neoquant.model.names import BLOCK_LINEARS
from neoquant.report.escaping import escape_controls
from neoquant.report.formatting import (
    NONE,
    divergence,
    divergence_interval,
    grid_label,
    nats_interval,
    share,
    suite_label,
)
from neoquant.report.shades import Shade, anchored, relative
from neoquant.report.split_table import Column, SplitTable
from neoquant.report.verdict import DIVERGENCE
from neoquant.sizes import plural

WORST = 10

# A ramp from nearly black to yellow that grows evenly lighter, so that it also orders the cells in shades of grey; the
# ink on it is white below the middle and black above. (Anchors of matplotlib's "cividis".)
RAMP = ((0, 34, 78), (18, 53, 112), (59, 73, 108), (87, 93, 109), (112, 113, 115), (138, 134, 120), (165, 156, 116),
        (195, 179, 105), (225, 204, 85), (254, 232, 56))  # fmt: skip


class Measure(NamedTuple):
    """One heat map: the figure of a cell, how it is written, and the bound of a single layer, if there is one."""

    title: str
    value: Callable[[Layer], float | None]
    write: Callable[[float], str]
    bound: float | None = None

    def shade(self, layers: Sequence[Layer]) -> Shade:
        """How deep the ground of each value is."""
        if self.bound is not None:
            return anchored(self.bound)
        return relative([v for layer in layers if layer.weight_error and (v := self.value(layer)) is not None])


def measures_of(result: Inspection) -> list[Measure]:
    """The heat maps that an inspection has figures for, the most telling last."""
    measures = [
        Measure("weight error, % of the weight's mean square", lambda layer: layer.weight_error, share),
        Measure("output error, % of the output's mean square", lambda layer: layer.output_error, share),
    ]
    changed = sum(layer.weight_error > 0 for layer in result.layers)
    if any(layer.loss for layer in result.layers):
        bound = DIVERGENCE / max(1, changed)
        measures.append(
            Measure(
                f"KL with this layer alone quantized, nats a token; an equal share of the bound is {divergence(bound)}",
                lambda layer: layer.loss.kl if layer.loss else None,
                divergence,
                bound,
            )
        )
    return measures


def inspection_table(result: Inspection) -> RenderableType:
    """All figures of an inspection."""
    models = f"{result.model.name} against {result.base.name}, layer by layer"
    amount = f"{suite_label(result.suite)}: {plural(result.windows, 'window')}, {plural(result.tokens, 'token')}"
    sections: list[RenderableType] = [Text(escape_controls(models)), Text(escape_controls(amount), style="dim")]
    for measure in measures_of(result):
        sections += [Text(), Text(measure.title, style="bold"), heat_table(result.layers, measure)]
    if most_affected(result):
        sections += [Text(), Text(_ranking(result), style="bold"), worst_table(result)]
    else:
        sections += [Text(), Text("no layer differs")]
    return Group(*sections, Text(), Text(_total(result)))


def heat_table(layers: Sequence[Layer], measure: Measure) -> SplitTable:
    """Blocks down, projections across; each cell its figure, on a ground that is lighter the larger the figure."""
    shade = measure.shade(layers)
    blocks = {number: {} for number in sorted({layer.block for layer in layers})}  # type: dict[int, dict[str, Layer]]
    for layer in layers:
        blocks[layer.block][layer.projection] = layer
    names = [f"{number} {next(iter(row.values())).attention}" for number, row in blocks.items()]
    columns = [
        Column(name.rpartition(".")[2], [_cell(row.get(name), measure, shade) for row in blocks.values()])
        for name in BLOCK_LINEARS
    ]
    return SplitTable("block", names, columns, padding=1)


def most_affected(result: Inspection, count: int = WORST) -> list[Layer]:
    """The layers whose quantization changes most: by KL, or by output error where no loss was measured."""
    changed = [layer for layer in result.layers if layer.weight_error > 0]
    return sorted(changed, key=lambda layer: layer.loss.kl if layer.loss else layer.output_error, reverse=True)[:count]


def worst_table(result: Inspection) -> SplitTable:
    """One line for each of the layers that lose most."""
    layers = most_affected(result)
    columns = [
        Column("weight %", [share(layer.weight_error) for layer in layers]),
        Column("output %", [share(layer.output_error) for layer in layers]),
        *(_loss_columns(layers) if any(layer.loss for layer in layers) else ()),
        Column("grid", [grid_text(layer) for layer in layers], "left", wraps=True),
    ]
    return SplitTable("layer", [f"h.{layer.block}.{layer.projection.rpartition('.')[2]}" for layer in layers], columns)


def _loss_columns(layers: Sequence[Layer]) -> list[Column]:
    return [
        Column("KL", [divergence(layer.loss.kl) if layer.loss else NONE for layer in layers]),
        Column("Δ nats/token", [f"{layer.loss.nats_per_token:+.5f}" if layer.loss else NONE for layer in layers]),
    ]


def _ranking(result: Inspection) -> str:
    """What `most_affected` goes by."""
    return f"layers with the largest {'loss' if any(layer.loss for layer in result.layers) else 'output error'}"


def grid_text(layer: Layer) -> str:
    """The layer's grid and its options."""
    return "not quantized" if layer.grid is None else grid_label(grid_from_dict(layer.grid))


def _cell(layer: Layer | None, measure: Measure, shade: Shade) -> Text:
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
    text = (
        f"whole model: KL {divergence_interval(together)} nats a token, change {nats_interval(*_change(together))}, "
        "95 % intervals"
    )
    losses = [layer.loss for layer in result.layers if layer.loss]
    if losses:
        text += f"; the KL of the layers alone add up to {divergence(sum(loss.kl for loss in losses))}"
    return text


def _change(loss: Loss) -> tuple[float, float | None, float | None]:
    return loss.nats_per_token, loss.low, loss.high
