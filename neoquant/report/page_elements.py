"""Elements of the page: tiles, charts, tables of shaded cells, and text that is safe to show."""

from __future__ import annotations

import re
from typing import Any, NamedTuple


class Chart(NamedTuple):
    title: str
    note: str
    svg: Any  # markup


class Tile(NamedTuple):
    """One figure of the headline."""

    label: str
    value: str
    detail: str
    state: str = ""  # "passes", "fails", "needs more text", or nothing where there is no bound


class Cell(NamedTuple):
    text: str
    shade: str | None = None  # 0 to 1, None for no ground
    title: str = ""
    over: bool = False  # at the bound or above


class HeatRow(NamedTuple):
    name: str
    cells: list[Cell]
    total: bool = False


class Heat(NamedTuple):
    caption: str
    corner: str
    columns: list[str]
    rows: list[HeatRow]


def chart(title: str, note: str, svg: str) -> Chart:
    """A chart of `neoquant.report.charts`, which made its markup and escaped its texts."""
    from markupsafe import Markup

    return Chart(title, note, Markup(svg))


_DIRECTIONS = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # they reorder what stands after them


def visible(text: str, lines: bool = False) -> str:
    """Text that a page may hold: control characters as their pictures (lines and tabs too, unless `lines`), and those
    that change the direction of text as U+FFFD."""
    text = _DIRECTIONS.sub("\ufffd", text.encode("utf-8", "replace").decode("utf-8"))
    return "".join(
        chr(0x2400 + ord(c)) if c < " " and not (lines and c in "\n\t") else "\ufffd" if "\x7f" <= c <= "\x9f" else c
        for c in text
    )


def unbroken(text: str) -> str:
    """Text in which a figure and its unit stay on one line."""
    return re.sub(r" (%|[KMGTP]B|nats|tokens/s)", "\u00a0\\1", text)
