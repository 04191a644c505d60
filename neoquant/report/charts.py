"""The charts of the page, each narrow enough for a phone.

Nothing is said by hue alone: what matters is also placed, filled, shaped or written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from neoquant.report.chart_labels import LETTER, cut, few_signed_ticks, name_points, name_rows, plain_log
from neoquant.report.svg import ACCENT, INK, MUTED, PAPER, Drawing, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from neoquant.evaluation.result import Change

ROW = 22  # height of a row in a chart of rows
DASHES = (0, (4, 3))


def percent(nats: float) -> float:
    """A change of nats a token as one of perplexity, in per cent."""
    return 100 * math.expm1(min(nats, 20))


class Point(NamedTuple):
    """A model in the chart of size against quality."""

    name: str
    megabytes: float
    value: float
    low: float | None  # the 95 % interval
    high: float | None
    chosen: bool


class Interval(NamedTuple):
    """A row of an interval chart."""

    name: str
    value: float
    low: float | None
    high: float | None
    chosen: bool = False  # drawn filled, in the accent

    @classmethod
    def of_change(cls, name: str, change: Change, chosen: bool) -> Interval:
        """The change of perplexity in per cent."""
        low, high = (None if end is None else percent(end) for end in (change.low, change.high))
        return cls(name, percent(change.nats_per_token), low, high, chosen)


class Spread(NamedTuple):
    """A row of a chart of distributions: quantiles by per cent."""

    name: str
    quantiles: dict[str, float]
    mean: float
    maximum: float
    chosen: bool


def size_chart(points: Sequence[Point], key: str, title: str, bound: float | None = None) -> str:
    """KL (logarithmic where all are positive) over size, with 95 % error bars; every point is named beside it.

    A dashed line lies at `bound` if the chart reaches that far.
    """
    with drawing(350, key, title) as (axes, done):
        logarithmic = all(point.value > 0 for point in points)
        if logarithmic:
            axes.set_yscale("log")
        for point in points:
            below = point.value - (point.value if point.low is None else point.low)
            below = min(below, 0.9 * point.value) if logarithmic else below  # zero has no place on the axis
            above = (point.value if point.high is None else point.high) - point.value
            axes.errorbar(
                point.megabytes,
                point.value,
                yerr=[[below], [above]],
                fmt="D" if point.chosen else "o",
                markersize=7 if point.chosen else 6,
                markerfacecolor=ACCENT if point.chosen else PAPER,
                markeredgecolor=ACCENT if point.chosen else INK,
                markeredgewidth=1.4,
                ecolor=ACCENT if point.chosen else INK,
                elinewidth=1.1,
                capsize=3,
            )
        axes.margins(x=0.08, y=0.12)
        low, high = axes.get_xlim()
        axes.set_xlim(low - 0.02 * (high - low), high + 0.1 * (high - low))
        axes.grid(axis="y")
        axes.set_xlabel("weights on disk, MB")
        axes.set_ylabel("KL divergence, nats a token")
        if logarithmic:
            plain_log(axes, "y")
        if bound is not None and axes.get_ylim()[0] < bound < axes.get_ylim()[1]:
            axes.axhline(bound, color=MUTED, linewidth=1, linestyle=DASHES)
        name_points(axes, points)
    return done.svg


def interval_chart(rows: Sequence[Interval], key: str, title: str, label: str, bound: float | None = None) -> str:
    """A row each: the estimate and its interval beside a line at zero; symmetric-logarithmic if rows differ widely.

    A dashed line lies at `bound` if the chart reaches that far.
    """
    with _rows([row.name for row in rows], key, title) as (axes, done):
        reach = sorted(max(abs(end) for end in (row.value, row.low, row.high) if end is not None) for row in rows)
        middle = reach[len(reach) // 2] if reach else 0.0
        if middle > 0 and reach[-1] > 20 * middle:
            axes.set_xscale("symlog", linthresh=10 ** math.ceil(math.log10(middle)), linscale=1)
        axes.axvline(0, color=MUTED, linewidth=1)
        for place, row in enumerate(rows):
            ink = ACCENT if row.chosen else INK
            if row.low is not None and row.high is not None:
                axes.plot([row.low, row.high], [place, place], color=ink, linewidth=1.3)
                axes.plot([row.low, row.high], [place, place], linestyle="", marker="|", markersize=7, color=ink)
            axes.plot(
                row.value,
                place,
                linestyle="",
                marker="D" if row.chosen else "o",
                markersize=6,
                markerfacecolor=ACCENT if row.chosen else PAPER,
                markeredgecolor=ink,
                markeredgewidth=1.4,
            )
        if bound is not None and axes.get_xlim()[0] < bound < axes.get_xlim()[1]:
            axes.axvline(bound, color=MUTED, linewidth=1, linestyle=DASHES)
        name_rows(axes, [row.name for row in rows], [row.chosen for row in rows])
        axes.grid(axis="x")
        axes.set_xlabel(label)
        few_signed_ticks(axes)
    return done.svg


def spread_chart(rows: Sequence[Spread], key: str, title: str, label: str) -> str:
    """A row each on a logarithmic axis: 1 to 99.9 % thin, 25 to 75 % thick, median, mean, 99 % and the maximum."""
    with _rows([row.name for row in rows], key, title) as (axes, done):
        axes.set_xscale("log")
        positive = [value for row in rows for value in (*row.quantiles.values(), row.maximum) if value > 0]
        floor = max(min(positive, default=1e-6), 1e-8, max(positive, default=1) / 1e9)

        def at(value: float) -> float:
            return max(value, floor)

        for place, row in enumerate(rows):
            q = row.quantiles
            ink = ACCENT if row.chosen else INK
            axes.plot([at(q["1"]), at(q["99.9"])], [place, place], color=ink, linewidth=1.1)
            axes.plot([at(q["25"]), at(q["75"])], [place, place], color=ink, linewidth=6, solid_capstyle="butt")
            axes.plot(at(q["50"]), place, "|", color=PAPER, markersize=9, markeredgewidth=2)
            axes.plot(at(q["99"]), place, "|", color=ink, markersize=9, markeredgewidth=1.4)
            axes.plot(
                at(row.mean),
                place,
                "D",
                markerfacecolor=PAPER,
                markeredgecolor=ink,
                markersize=5.5,
                markeredgewidth=1.3,
            )
            axes.plot(at(row.maximum), place, "x", color=ink, markersize=5, markeredgewidth=1.2)
        name_rows(axes, [row.name for row in rows], [row.chosen for row in rows])
        axes.grid(axis="x")
        axes.set_xlabel(label)
        plain_log(axes, "x")
    return done.svg


def histogram_chart(edges: Sequence[float], counts: Sequence[int], key: str, title: str, label: str) -> str:
    """Tokens by value, on a logarithmic axis of counts, so that the rare large changes are seen."""
    with drawing(210, key, title) as (axes, done):
        filled = [number for number, count in enumerate(counts) if count]
        first, last = (filled[0], filled[-1] + 1) if filled else (0, len(counts))
        axes.set_yscale("log")
        heights = [max(count, 0.5) for count in counts[first:last]]
        axes.stairs(heights, edges[first : last + 1], baseline=0.5, fill=True, color=ACCENT, linewidth=0)
        if edges[first] < 0 < edges[last]:
            axes.axvline(0, color=INK, linewidth=1)
        elif edges[first] > 0 and edges[last] / edges[first] > 100:
            axes.set_xscale("log")
            plain_log(axes, "x")
        axes.grid(axis="y")
        axes.set_xlabel(label)
        axes.set_ylabel("tokens")
        plain_log(axes, "y")
        if edges[first] < 0 < edges[last]:
            few_signed_ticks(axes)
    return done.svg


@contextmanager
def _rows(names: Sequence[str], key: str, title: str) -> Iterator[tuple[Axes, Drawing]]:
    left = 12 + LETTER * max((len(cut(name)) for name in names), default=0)
    with drawing(ROW * len(names) + 56, key, title, left) as (axes, done):
        axes.set_ylim(len(names) - 0.4, -0.6)
        yield axes, done
