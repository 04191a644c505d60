"""What a verb says and to whom: results to stdout, notes, progress and errors to stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

from neoquant.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress as RichBars

PIPED_WIDTH = 200  # columns for tables where no terminal says how many it has


class Terminal:
    """The person at the other end. `quiet` silences notes and progress; `debug` asks for tracebacks."""

    def __init__(self) -> None:
        self.quiet = False
        self.debug = False

    def show(self, *renderables: RenderableType) -> None:
        """A result: text without markup, or a table, to stdout."""
        for renderable in renderables:
            self._out.print(renderable, markup=False, highlight=False, soft_wrap=isinstance(renderable, str))

    def show_facts(self, facts: Iterable[tuple[str, str]]) -> None:
        """A result of labelled lines: `label  text`."""
        facts = list(facts)
        width = max(len(label) for label, _ in facts)
        if not self._out.is_terminal:  # a line each, whatever its length: for grep
            self.show(*(f"{label:<{width}}  {text}" for label, text in facts))
            return
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True, style="dim")
        table.add_column(overflow="fold")
        for label, text in facts:
            table.add_row(Text(label), Text(text))
        self.show(table)

    def note(self, text: str) -> None:
        """One line that is not a result, to stderr."""
        if not self.quiet:
            self._err.print(text, markup=False, highlight=False, soft_wrap=True)

    def say_last(self, message: str) -> None:
        """The one line that says why it ends here: never silent, and without rich, which may be what failed."""
        print(" ".join(message.split()), file=sys.stderr)

    @cached_property
    def progress(self) -> Progress:
        """Bars with the time left where somebody watches; notes in any case."""
        return Bars(self, self._err) if self._err.is_terminal and not self.quiet else Notes(self)

    @cached_property
    def _out(self) -> Console:
        return _console(stderr=False)

    @cached_property
    def _err(self) -> Console:
        return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    return console


class Notes(Progress):
    """What is worth knowing now, without bars."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal

    def note(self, text: str) -> None:
        self._terminal.note(text)


class Bars(Notes):
    """Rich's bars: they appear with the first task and disappear with the last."""

    def __init__(self, terminal: Terminal, console: Console) -> None:
        super().__init__(terminal)
        self._console = console
        self._bars: RichBars | None = None

    @contextmanager
    def task(self, label: str, total: float | None) -> Iterator[Callable[[float], None]]:
        """Show a bar called `label` until the block ends."""
        outermost = self._bars is None
        bars = self._bars = self._bars or self._make()
        task = bars.add_task(label, total=total)
        if outermost:
            bars.start()
        try:
            yield lambda amount: bars.advance(task, amount)
        finally:
            bars.remove_task(task)
            if outermost:
                bars.stop()
                self._bars = None

    def _make(self) -> RichBars:
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichBars

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        return RichBars(*columns, console=self._console, transient=True)
