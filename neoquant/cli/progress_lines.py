"""Progress of another neoquant process: it writes lines of JSON, and the one that started it shows them as its own."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from neoquant.progress import Progress

VARIABLE = "NEOQUANT_PROGRESS_LINES"
"""Environment variable that makes a process write its progress as lines, for the process that it numbers."""

_PR_SET_PDEATHSIG = 1  # prctl(2)
_MARK = "\x1e"  # the record separator: no message begins with it
_PAUSE = 0.1  # seconds between two lines


class ProgressLines(Progress):
    """Writes to stderr what a task is called, its total, and how far it is."""

    @contextmanager
    def task(self, label: str, total: float | None) -> Iterator[Callable[[float], None]]:
        done, written = 0.0, 0.0

        def advance(amount: float) -> None:
            nonlocal done, written
            done += amount
            if time.monotonic() - written >= _PAUSE:
                written = time.monotonic()
                _write({"done": done})

        _write({"label": label, "total": total})
        try:
            yield advance
        finally:
            _write({"end": True})


def run_with_progress(command: Sequence[str], environment: Mapping[str, str], progress: Progress) -> tuple[int, str]:
    """Run a neoquant command; its exit code, and what it wrote to stderr besides its progress.

    Interrupting this process ends that one, too, and so does killing it (on Linux; elsewhere its next line does).
    """
    process = subprocess.Popen(
        command,
        env={**environment, VARIABLE: str(os.getpid())},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    assert process.stderr is not None
    errors = []
    tasks: list[tuple[ExitStack, Callable[[float], None]]] = []
    counted: list[float] = []
    try:
        for line in process.stderr:
            if line.startswith(_MARK):
                _pass_on(json.loads(line[len(_MARK) :]), progress, tasks, counted)
            else:
                errors.append(line)
        return process.wait(), "".join(errors)
    finally:
        while tasks:
            tasks.pop()[0].close()
        if process.poll() is None:
            process.terminate()
            process.wait()


def _pass_on(
    event: Mapping[str, Any],
    progress: Progress,
    tasks: list[tuple[ExitStack, Callable[[float], None]]],
    counted: list[float],
) -> None:
    """Begin, advance or end a task as a line says; `tasks` are those that have begun, `counted` how far they are."""
    if "label" in event:
        stack = ExitStack()
        tasks.append((stack, stack.enter_context(progress.task(event["label"], event["total"]))))
        counted.append(0.0)
    elif tasks and "done" in event:
        tasks[-1][1](event["done"] - counted[-1])
        counted[-1] = event["done"]
    elif tasks:
        counted.pop()
        tasks.pop()[0].close()


def is_asked_for() -> bool:
    return bool(os.environ.get(VARIABLE))


def end_with_starter() -> None:
    """Have the system end this process when the one that reads its lines ends, killed as it may be."""
    starter = os.environ.get(VARIABLE, "")
    with suppress(OSError, AttributeError, TypeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if starter.isdecimal() and os.getppid() != int(starter):  # it ended before we asked
            os.kill(os.getpid(), signal.SIGTERM)


def _write(event: Mapping[str, Any]) -> None:
    print(f"{_MARK}{json.dumps(event)}", file=sys.stderr, flush=True)
