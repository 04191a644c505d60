"""A table that stays readable in a narrow terminal: columns that do not fit follow below, beside the rows' names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from neoquant.report.escaping import escape_controls

LEAST_NAME = 12
"""Cells that rows' names keep, where a column leaves them; longer names are folded."""


class Column(NamedTuple):
    """A heading and one cell a row."""

    heading: str
    cells: Sequence[str | Text]
    justify: JustifyMethod = "right"
    wraps: bool = False  # running text, which may break over lines


class SplitTable:
    """Rows of figures. Figures are never cut: the columns are spread over as many tables as the width asks for.

    `styles`: one a row. `total`: the last row stands apart, in bold.
    """

    def __init__(
        self,
        heading: str,
        names: Sequence[str],
        columns: Sequence[Column],
        *,
        styles: Sequence[str] | None = None,
        total: bool = False,
        padding: int = 2,
    ) -> None:
        self.heading = heading
        self.names = [escape_controls(name, one_line=True) for name in names]
        self.columns = [column._replace(cells=[_escaped(cell) for cell in column.cells]) for column in columns]
        self.styles = styles or [""] * len(names)
        self.total = total
        self.padding = padding

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        longest, widths = self._widths()
        room = options.max_width
        least = longest
        if longest + sum(self.padding + width for width in widths) > room:
            least = min(longest, max(LEAST_NAME, min(room // 3, room - self.padding - max(widths, default=0))))
        for group in self._groups(room - least, widths):
            taken = sum(self.padding + widths[number] for number in group)
            yield self._table([self.columns[number] for number in group], min(longest, max(least, room - taken)))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        name, widths = self._widths()
        return Measurement(min(LEAST_NAME, name), name + sum(self.padding + width for width in widths)).clamp(
            max_width=options.max_width
        )

    def _widths(self) -> tuple[int, list[int]]:
        """Of the names, and of each column."""
        name = max((cell_len(text) for text in (self.heading, *self.names)), default=0)
        widths = [max(cell_len(str(cell)) for cell in (c.heading, *c.cells)) for c in self.columns]
        return name, widths

    def _groups(self, room: int, widths: Sequence[int]) -> Iterator[list[int]]:
        """Numbers of columns, as many together as fit; one at least."""
        group: list[int] = []
        used = 0
        for number, width in enumerate(widths):
            if group and used + self.padding + width > room:
                yield group
                group, used = [], 0
            group.append(number)
            used += self.padding + width
        if group:
            yield group

    def _table(self, columns: Sequence[Column], name: int) -> Table:
        table = Table(box=None, header_style="dim", padding=(0, self.padding, 0, 0), pad_edge=False)
        table.add_column(self.heading, overflow="fold", max_width=name, min_width=min(name, LEAST_NAME))
        for column in columns:
            table.add_column(column.heading, justify=column.justify, no_wrap=not column.wraps)
        last = len(self.names) - 1
        for row, label in enumerate(self.names):
            cells = [column.cells[row] for column in columns]
            texts = [Text(cell) if isinstance(cell, str) else cell for cell in cells]  # a name is no markup
            style = "bold" if self.total and row == last else self.styles[row]
            table.add_row(Text(_folded(label, name)), *texts, style=style, end_section=self.total and row == last - 1)
        return table


def _escaped(cell: str | Text) -> str | Text:
    return escape_controls(cell) if isinstance(cell, str) else cell


def _folded(name: str, width: int) -> str:
    """A name on lines of at most `width` cells, broken after a space or a mark where that leaves no short line."""
    lines = []
    while cell_len(name) > width:
        longest = _fitting(name, width)
        marks = [place + 1 for place, letter in enumerate(name[:longest]) if letter in " .-/" and 3 * place >= width]
        cut = marks[-1] if marks else longest
        lines.append(name[:cut].rstrip())
        name = name[cut:]
    return "\n".join([*lines, name])


def _fitting(text: str, width: int) -> int:
    """How many characters at its beginning fill at most `width` cells, one at least; accents stay on their letters."""
    taken = 0
    for place, letter in enumerate(text):
        taken += cell_len(letter)
        if taken > width and place:
            return place
    return len(text)
