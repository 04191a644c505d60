"""Charts as inline SVG: text stays text, colours are the page's CSS variables, and the same data gives the same bytes.

Every chart is drawn narrow enough for a phone, and says nothing by hue alone: what matters is also placed, filled,
shaped or written. Sizes are in the SVG's own units, of which a chart is WIDTH wide.
"""

from __future__ import annotations

import io
import math
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from neoquant.evaluation.result import Change

WIDTH = 380
ROW = 22  # height of a row in a chart of rows
DASHES = (0, (4, 3))
LETTER = 6.6  # width of a letter, as most are in most fonts

# Stand-ins that matplotlib can parse -> the page's variables.
INK, MUTED, LINE, ACCENT, PAPER = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", ACCENT: "--accent", PAPER: "--paper"}

LIGHT = "--paper:#fff;--ink:#16191d;--muted:#555d68;--line:#d5dae0;--accent:#0b57a4;"
DARK = "--paper:#14171b;--ink:#e9ecef;--muted:#a4adb8;--line:#3a414a;--accent:#7db8f5;"

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "neoquant",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 10.5,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "xtick.major.width": 0.8,
    "ytick.major.width": 0.8,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
}
_SVG = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"


def percent(nats: float) -> float:
    """A change of nats a token as one of perplexity, in per cent."""
    return 100 * math.expm1(min(nats, 20))


class Point(NamedTuple):
    """A model in the chart of size against quality."""

    name: str
    megabytes: float
    value: float
    error: float | None  # standard error
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
    with _chart(350, key, title) as (axes, done):
        logarithmic = all(point.value > 0 for point in points)
        if logarithmic:
            axes.set_yscale("log")
        for point in points:
            reach = 1.96 * (point.error or 0)
            low = min(reach, 0.9 * point.value) if logarithmic else reach
            axes.errorbar(
                point.megabytes,
                point.value,
                yerr=[[low], [reach]],
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
            _plain_log(axes, "y")
        if bound is not None and axes.get_ylim()[0] < bound < axes.get_ylim()[1]:
            axes.axhline(bound, color=MUTED, linewidth=1, linestyle=DASHES)
        _name_points(axes, points)
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
        _name_rows(axes, [row.name for row in rows], [row.chosen for row in rows])
        axes.grid(axis="x")
        axes.set_xlabel(label)
        _few_signed_ticks(axes)
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
        _name_rows(axes, [row.name for row in rows], [row.chosen for row in rows])
        axes.grid(axis="x")
        axes.set_xlabel(label)
        _plain_log(axes, "x")
    return done.svg


def histogram_chart(edges: Sequence[float], counts: Sequence[int], key: str, title: str, label: str) -> str:
    """Tokens by value, on a logarithmic axis of counts, so that the rare large changes are seen."""
    with _chart(210, key, title) as (axes, done):
        filled = [number for number, count in enumerate(counts) if count]
        first, last = (filled[0], filled[-1] + 1) if filled else (0, len(counts))
        axes.set_yscale("log")
        heights = [max(count, 0.5) for count in counts[first:last]]
        axes.stairs(heights, edges[first : last + 1], baseline=0.5, fill=True, color=ACCENT, linewidth=0)
        if edges[first] < 0 < edges[last]:
            axes.axvline(0, color=INK, linewidth=1)
        elif edges[first] > 0 and edges[last] / edges[first] > 100:
            axes.set_xscale("log")
            _plain_log(axes, "x")
        axes.grid(axis="y")
        axes.set_xlabel(label)
        axes.set_ylabel("tokens")
        _plain_log(axes, "y")
        if edges[first] < 0 < edges[last]:
            _few_signed_ticks(axes)
    return done.svg


def standalone(svg: str, description: str) -> str:
    """A chart as a file of its own, light or dark as its reader is; `description` says in words what it shows."""
    from xml.sax.saxutils import escape

    style = f"svg{{{LIGHT}background:var(--paper)}}@media(prefers-color-scheme:dark){{svg{{{DARK}}}}}"
    head, _, rest = svg.partition(">")
    opening = f'{head} xmlns="{_SVG}" width="{1.4 * WIDTH:.0f}">'
    return (
        f"{opening}\n<desc>{escape(description)}</desc>\n<style>{style}text{{font-family:sans-serif}}</style>{rest}\n"
    )


class _Done:
    svg = ""


@contextmanager
def _chart(height: float, key: str, title: str, left: float = 62) -> Iterator[tuple[Axes, _Done]]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    done = _Done()
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of glyphs that the measuring font lacks; the browser's has them
        figure = Figure(figsize=(WIDTH / 72, height / 72))
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        # Margins are known beforehand: measuring every text would take twice the time of drawing.
        figure.subplots_adjust(left / WIDTH, 46 / height, 1 - 14 / WIDTH, 1 - 8 / height)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        yield axes, done
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    done.svg = _inline(buffer.getvalue(), key, title)


@contextmanager
def _rows(names: Sequence[str], key: str, title: str) -> Iterator[tuple[Axes, _Done]]:
    left = 12 + LETTER * max((len(_cut(name)) for name in names), default=0)
    with _chart(ROW * len(names) + 56, key, title, left) as (axes, done):
        axes.set_ylim(len(names) - 0.4, -0.6)
        yield axes, done


def _name_rows(axes: Axes, names: Sequence[str], chosen: Sequence[bool]) -> None:
    axes.set_yticks(range(len(names)), [_cut(name) for name in names])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    for text, strong in zip(axes.get_yticklabels(), chosen, strict=True):
        text.set_fontweight("bold" if strong else "normal")


def _name_points(axes: Axes, points: Sequence[Point]) -> None:
    """Names beside the points, each where the fewest others are in its way."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    placed: list[tuple[float, float, float, float]] = []
    spots = {point.name: axes.transData.transform((point.megabytes, point.value)) for point in points}
    frame = axes.get_window_extent()
    for point in sorted(points, key=lambda point: (not point.chosen, point.megabytes)):
        name = _cut(point.name)
        x, y = spots[point.name]
        width, height = LETTER * len(name), 12
        best, least = None, math.inf
        for dx, dy, side in ((9, 0, "left"), (-9, 0, "right"), (9, 11, "left"), (9, -11, "left"), (-9, 11, "right"),
                             (-9, -11, "right"), (0, 15, "center"), (0, -15, "center")):  # fmt: skip
            left = x + dx - {"left": 0, "right": width, "center": width / 2}[side]
            box = (left, y + dy - height / 2, left + width, y + dy + height / 2)
            others = [(sx - 5, sy - 5, sx + 5, sy + 5) for other, (sx, sy) in spots.items() if other != point.name]
            cost = sum(_overlap(box, other) for other in (*placed, *others))
            cost += (
                5 * max(0, frame.x0 - box[0]) + 5 * max(0, box[2] - frame.x1 - 12) + 0.01 * (abs(dy) + (side != "left"))
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


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _cut(name: str, length: int = 22) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _plain_log(axes: Axes, which: str) -> None:
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


def _few_signed_ticks(axes: Axes) -> None:
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


def _inline(svg: str, key: str, title: str) -> str:
    """matplotlib's file as an element of a page: no metadata, no fixed size, ids of its own, the page's colours."""
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ET.fromstring(svg.partition("<svg")[1] + svg.partition("<svg")[2])
    used = {element.get(_LINK, "").removeprefix("#") for element in root.iter()}
    used |= {part.partition(")")[0] for e in root.iter() for v in e.attrib.values() for part in v.split("url(#")[1:]}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        _adapt(element, key, used)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", title)
    text = ET.tostring(root, encoding="unicode")
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return (
        text.replace(f' xmlns="{_SVG}"', "")
        .replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
        .replace("xlink:href", "href")
    )


def _adapt(element: Any, key: str, used: set[str]) -> None:
    name = element.get("id")
    if name is not None:
        if name in used:
            element.set("id", f"{key}-{name}")
        else:
            del element.attrib["id"]
    if _LINK in element.attrib:
        element.set(_LINK, f"#{key}-{element.get(_LINK).removeprefix('#')}")
    for attribute, value in element.attrib.items():
        if "url(#" in value:
            element.set(attribute, value.replace("url(#", f"url(#{key}-"))
