"""The progress of an evaluation in a file, from which an interrupted one resumes.

A file holds an accumulator and the numbers of the batches in it. It is replaced by one rename, so it is complete
whenever the process ends. An accumulator does not depend on the order of its batches, so a resumed evaluation gives the
figures of an uninterrupted one. Each process of a group writes a file of its own; resuming reads all of them. The files
stay until the result is stored, when `remove_journal` deletes them.
"""

from __future__ import annotations

import pickle
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from neoquant.distributed import SINGLE_PROCESS, ProcessGroup
from neoquant.errors import OutputError
from neoquant.evaluation.accumulator import Accumulator
from neoquant.files.writing import replacing

INTERVAL = 15.0
"""Seconds between two writings, at least."""

_ZIP = b"PK\x03\x04"


class ResumeNote(UserWarning):
    """An evaluation resumes from an earlier one's journal, or cannot."""


class Journal:
    """The files `path`, `path.1`, `path.2`, ... of the evaluation that `key` identifies."""

    def __init__(self, path: Path, key: str, group: ProcessGroup = SINGLE_PROCESS) -> None:
        self.path, self.key, self.group = path, key, group
        self._own = path if group.rank == 0 else Path(f"{path}.{group.rank}")
        self._written = time.monotonic()

    def restore(self, accumulator: Accumulator, batches: int) -> set[int]:
        """Put what the files hold into the first process's accumulator; the numbers of the batches that are done.

        Raises OutputError, and deletes nothing, where a file of that name is no journal.
        """
        done: set[int] = set()
        if self.group.rank == 0:
            files = _journal_files(self.path)
            for file in files:
                _require_journal(file)
            found = sorted(filter(None, map(self._read, files)), key=lambda state: -len(state["done"]))
            for state in found:
                if done.isdisjoint(state["done"]):  # else an earlier resume has merged it
                    accumulator.merge(state["accumulator"])
                    done |= state["done"]
            if done:
                _note(f"resuming from {self.path}: {len(done)} of {batches} batches are scored")
                self.write(accumulator, done)
            elif files and not found:
                _note(f"{self.path} is of another evaluation or damaged: starting from the beginning")
            for file in files:
                if file != self._own or not done:
                    file.unlink(missing_ok=True)
        return set(self.group.all_gather(done)[0])

    def write_if_due(self, accumulator: Accumulator, done: set[int]) -> None:
        """`write`, but not more often than every INTERVAL seconds."""
        if time.monotonic() - self._written >= INTERVAL:
            self.write(accumulator, done)

    def write(self, accumulator: Accumulator, done: set[int]) -> None:
        """Replace this process's file. Raises OutputError where it cannot be written."""
        with replacing(self._own) as file:
            torch.save({"key": self.key, "done": sorted(done), **accumulator.state()}, file)
        self._written = time.monotonic()

    def _read(self, file: Path) -> dict[str, Any] | None:
        """A file's batches and accumulator; None if it is of another evaluation, or no journal at all."""
        try:
            state = torch.load(file, weights_only=True)
            if not isinstance(state, dict) or state.get("key") != self.key:
                return None
            return {"done": set(state["done"]), "accumulator": Accumulator.from_state(state)}
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, TypeError, pickle.UnpicklingError):
            return None


def remove_journal(path: Path) -> None:
    """Delete the files of the journal `path`: its result is stored."""
    for file in _journal_files(path):
        file.unlink(missing_ok=True)


def _journal_files(path: Path) -> list[Path]:
    others = [
        file for file in path.parent.iterdir() if file.name.startswith(f"{path.name}.") and file.suffix[1:].isdigit()
    ]
    return [file for file in (path, *sorted(others)) if file.is_file()]


def _require_journal(file: Path) -> None:
    """A journal is what torch.save writes, a zip; a damaged one still begins like that."""
    with file.open("rb") as opened:
        if opened.read(len(_ZIP)) != _ZIP:
            raise OutputError(
                f"{file} is no journal of neoquant, and would be replaced: move it, or name another result"
            )


def _note(text: str) -> None:
    warnings.warn(text, ResumeNote, stacklevel=2)
