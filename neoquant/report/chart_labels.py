"""Names of points and rows in charts, and ticks that can be read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from neoquant.report.svg import ACCENT, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LETTER = 6.6  # width of a letter, as most are in most fonts
_NARROW = frozenset(" ,.:;'|()ijlft1")


class Named(Protocol):
    """A point with a name."""

    @property
    def name(self) -> str: ...
    @property
    def megabytes(self) -> float: ...
    @property
    def value(self) -> float: ...
    @property
    def chosen(self) -> bool: ...


def name_rows(axes: Axes, names: Sequence[str], chosen: Sequence[bool]) -> None:
    axes.set_yticks(range(len(names)), [cut(name) for name in names])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    for text, strong in zip(axes.get_yticklabels(), chosen, strict=True):
        text.set_fontweight("bold" if strong else "normal")


def name_points(axes: Axes, points: Sequence[Named], beside: Iterable[tuple[float, float]] = ()) -> None:
    """Names beside the points, each where the fewest others are in its way, or marks `beside` them (x, y)."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    placed: list[tuple[float, float, float, float]] = []
    spots = {point.name: axes.transData.transform((point.megabytes, point.value)) for point in points}
    marks = [axes.transData.transform(mark) for mark in beside]
    frame = axes.get_window_extent()
    for point in sorted(points, key=lambda point: (not point.chosen, point.megabytes)):
        name = cut(point.name)
        x, y = spots[point.name]
        width, height = _width(name), 14
        best, least = None, math.inf
        for dx, dy, side in ((9, 0, "left"), (-9, 0, "right"), (9, 11, "left"), (9, -11, "left"), (-9, 11, "right"),
                             (-9, -11, "right"), (0, 15, "center"), (0, -15, "center"), (9, 20, "left"),
                             (9, -20, "left")):  # fmt: skip
            left = x + dx - {"left": 0, "right": width, "center": width / 2}[side]
            box = (left, y + dy - height / 2, left + width, y + dy + height / 2)
            in_the_way = [*(spot for other, spot in spots.items() if other != point.name), *marks]
            others = [(sx - 5, sy - 5, sx + 5, sy + 5) for sx, sy in in_the_way]
            cost = sum(_overlap(box, other) for other in (*placed, *others))
            cost += (
                5 * max(0, frame.x0 - box[0]) + 5 * max(0, box[2] - frame.x1 - 6) + 0.01 * (abs(dy) + (side != "left"))
            )
            if cost < least:
                best, least = (dx, dy, side, box), cost
        assert best is not None
        dx, dy, side, box = best
        placed.append(box)
        axes.annotate(
            name,
            (point.megabytes, point.value),
            (dx, dy),
            textcoords="offset points",
            ha=side,
            va="center",
            fontweight="bold" if point.chosen else "normal",
            color=ACCENT if point.chosen else INK,
            fontsize=10.5,
        )


def _width(name: str) -> float:
    """How wide a name is, about."""
    return sum(LETTER / 2 if letter in _NARROW else LETTER for letter in name)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def cut(name: str, length: int = 22) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def plain_log(axes: Axes, which: str) -> None:
    """Ticks at powers of ten, few enough to be read: 0.001 and not 10^-3, which is not text."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    decades = math.log10(high / low)
    axis.set_major_locator(LogLocator(10, subs=(1.0, 3.0) if decades < 2 else (1.0,), numticks=7))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _short(value: float) -> str:
    """`0.001`, `1e-6`, `10,000`"""
    if value == 0:
        return "0"
    if 10 <= abs(value) < 1e7:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.2g}" if 1e-4 <= abs(value) < 1e7 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return text.replace("-", "−") if text.startswith("-") else text


def few_signed_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if axes.get_xscale() == "linear":
        axes.xaxis.set_major_locator(MaxNLocator(5))
    else:
        limits = axes.get_xlim()
        inside = [tick for tick in axes.get_xticks() if limits[0] <= tick <= limits[1]]
        step = max(1, math.ceil((len(inside) - 1) / 5))
        zero = inside.index(0.0) if 0.0 in inside else 0
        axes.set_xticks([tick for number, tick in enumerate(inside) if (number - zero) % step == 0])
        axes.set_xticks([], minor=True)
        axes.set_xlim(limits)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: ("+" if value > 0 else "") + _short(value)))
