"""What a verb says and to whom: results to stdout, notes, progress and errors to stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

from neoquant.cli import progress_lines
from neoquant.progress import Progress
from neoquant.report.escaping import escape_controls

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress as RichBars

PIPED_WIDTH = 200  # columns for tables where no terminal says how many it has
BESIDE_LABEL = 22  # columns of a progress bar at its shortest, the share that is done and the time left
LONGEST_MESSAGE = 2000  # characters of an error: a value from a file may be of any length


class Terminal:
    """The person at the other end. `quiet` silences notes and progress; `debug` asks for tracebacks."""

    def __init__(self) -> None:
        self.quiet = False
        self.debug = False
        self.file_on_stdout = False
        """Whether a file that was asked for as `-` takes stdout: everything else then goes to stderr."""
        self.at_end: list[Callable[[], None]] = []
        """What is to be given back when the command has ended, however it did."""

    def show(self, *renderables: RenderableType) -> None:
        """A result: text without markup, or a table, to stdout."""
        for renderable in renderables:
            if isinstance(renderable, str):
                self._out.print(escape_controls(renderable), markup=False, highlight=False, soft_wrap=True)
            else:
                self._out.print(renderable, markup=False, highlight=False)

    def show_facts(self, facts: Iterable[tuple[str, str]]) -> None:
        """A result of labelled lines: `label  text`."""
        facts = [(escape_controls(label), escape_controls(text)) for label, text in facts]
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
            self._err.print(escape_controls(text), markup=False, highlight=False, soft_wrap=True)

    def say_last(self, message: str) -> None:
        """The one line that says why it ends here: never silent, and without rich, which may be what failed."""
        line = escape_controls(" ".join(message.split()))
        if len(line) > LONGEST_MESSAGE:
            line = f"{line[: LONGEST_MESSAGE // 2]} ... {line[-LONGEST_MESSAGE // 2 :]}"
        print(line, file=sys.stderr)

    def show_raw(self, text: str) -> None:
        """A piece of text to stdout as it is; on a terminal, without what would control it."""
        sys.stdout.write(escape_controls(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()

    @cached_property
    def progress(self) -> Progress:
        """Bars with the time left where somebody watches; notes in any case."""
        if progress_lines.is_asked_for():
            return progress_lines.ProgressLines()
        return Bars(self, self._err) if self._err.is_terminal and not self.quiet else Notes(self)

    @cached_property
    def _out(self) -> Console:
        return _console(stderr=self.file_on_stdout)

    @cached_property
    def _err(self) -> Console:
        return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console, ConsoleOptions
    from rich.segment import Segment

    class EscapingConsole(Console):
        """Escapes what is left of controls in renderables; those that rich drops, or counts, are escaped before."""

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else segment._replace(text=escape_controls(segment.text))

    console = EscapingConsole(stderr=stderr, markup=False, emoji=False)
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
        task = bars.add_task(escape_controls(label), total=total)
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
        from rich.table import Column

        # A long label, as of a file, leaves room for the share that is done and for the time left.
        label = Column(no_wrap=True, overflow="ellipsis", max_width=max(8, self._console.width - BESIDE_LABEL))
        columns = (
            TextColumn("{task.description}", markup=False, table_column=label),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
        )
        return RichBars(*columns, console=self._console, transient=True)
