"""Charts as inline SVG: text stays text, colours are the page's CSS variables, and the same data gives the same bytes.

Sizes are in the SVG's own units, of which a chart is WIDTH wide.
"""

from __future__ import annotations

import io
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 380

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


def standalone(svg: str, description: str) -> str:
    """A chart as a file of its own, light or dark as its reader is; `description` is its text alternative."""
    from xml.sax.saxutils import escape

    style = f"svg{{{LIGHT}background:var(--paper)}}@media(prefers-color-scheme:dark){{svg{{{DARK}}}}}"
    head, _, rest = svg.partition(">")
    opening = f'{head} xmlns="{_SVG}" width="{1.4 * WIDTH:.0f}">'
    return (
        f"{opening}\n<desc>{escape(description)}</desc>\n<style>{style}text{{font-family:sans-serif}}</style>{rest}\n"
    )


class Drawing:
    svg = ""


@contextmanager
def drawing(height: float, key: str, title: str, left: float = 62) -> Iterator[tuple[Axes, Drawing]]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    done = Drawing()
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
