"""Progress bars in terminals of any width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from neoquant.cli.terminal import Bars, Terminal

LABELS = ["scoring", "reading a-very-long-name-of-a-file.jsonl", "long " * 50, "\x1b]0;title\x07 [red]x"]


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("label", LABELS)
def test_the_share_that_is_done_and_the_time_left_are_always_seen(width: int, label: str) -> None:
    bars, seen = Bars(Terminal(), Console(file=io.StringIO(), force_terminal=True, width=width)), io.StringIO()
    with bars.task(label, total=8) as advance:
        advance(2)
        assert bars._bars is not None
        Console(file=seen, width=width).print(bars._bars.get_renderable())
    (line,) = seen.getvalue().rstrip("\n").splitlines()
    assert " 25% " in line and line.rstrip().endswith("-:--:--") and "\x1b" not in line
    assert line.startswith(label[:8].replace("\x1b", "\\x1b")[:8]) and len(line) <= width
