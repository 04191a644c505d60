"""How long-running work says how far it is, without knowing who listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Progress:
    """The silent listener, and the interface of every other.

    Work announces a task and its total (in any unit: tensors, tokens, bytes) and advances it::

        with progress.task("quantizing", total=len(names)) as advance:
            for name in names:
                ...
                advance(1)
    """

    @contextmanager
    def task(self, label: str, total: float | None) -> Iterator[Callable[[float], None]]:
        """Announce a task called `label` of size `total`, None if unknown; what is yielded advances it by an amount."""
        yield lambda amount: None

    def note(self, text: str) -> None:
        """Say one line that is worth knowing now."""


SILENT = Progress()
