"""What has been scored so far, in a file, so that an interrupted evaluation can resume.

A file holds a whole tally and the numbers of the batches in it, and is replaced by one rename: it is there and right,
whenever the process ends. A tally does not depend on the order of its batches, so the figures are those of an
evaluation that was never interrupted. Of a team, each process keeps its own file, and whoever resumes reads them all.
"""

from __future__ import annotations

import os
import pickle
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from neoquant.errors import OutputError
from neoquant.evaluation.accumulator import Tally
from neoquant.evaluation.distributed import ALONE, Team

INTERVAL = 15.0
"""Seconds between two writings, at least."""


class ResumeNote(UserWarning):
    """An evaluation resumes an interrupted one, or cannot."""


class Journal:
    """The files `path`, `path.1`, `path.2`, ... of the evaluation that `key` identifies."""

    def __init__(self, path: Path, key: str, team: Team = ALONE) -> None:
        self.path, self.key, self.team = path, key, team
        self._own = path if team.rank == 0 else Path(f"{path}.{team.rank}")
        self._written = time.monotonic()

    def restore(self, tally: Tally, batches: int) -> set[int]:
        """Put what the files hold into the first process's tally; the numbers of the batches that are done."""
        done: set[int] = set()
        if self.team.rank == 0:
            files = self._files()
            found = sorted(filter(None, map(self._read, files)), key=lambda state: -len(state["done"]))
            for state in found:
                if done.isdisjoint(state["done"]):  # else it was taken over already, before an interruption
                    tally.merge(state["tally"])
                    done |= state["done"]
            if done:
                _note(f"resuming from {self.path}: {len(done)} of {batches} batches are scored")
                self.write(tally, done)
            elif files:
                _note(f"{self.path} is of another evaluation or damaged: starting from the beginning")
            for file in files:
                if file != self._own or not done:
                    file.unlink(missing_ok=True)
        return set(self.team.share(done)[0])

    def keep(self, tally: Tally, done: set[int]) -> None:
        """Write, if the last time is long enough ago."""
        if time.monotonic() - self._written >= INTERVAL:
            self.write(tally, done)

    def write(self, tally: Tally, done: set[int]) -> None:
        """Replace this process's file. Raises OutputError where it cannot be written."""
        new = Path(f"{self._own}.new")
        try:
            with new.open("wb") as file:
                torch.save({"key": self.key, "done": sorted(done), **tally.state()}, file)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._own)
        except OSError as error:
            new.unlink(missing_ok=True)
            raise OutputError(f"{self._own} cannot be written: {error.strerror}") from error
        self._written = time.monotonic()

    def remove(self) -> None:
        """Delete the files: the result is where it was asked for."""
        for file in self._files() if self.team.rank == 0 else []:
            file.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        others = [file for file in self.path.parent.glob(f"{self.path.name}.*") if file.suffix[1:].isdigit()]
        return [file for file in (self.path, *sorted(others)) if file.is_file()]

    def _read(self, file: Path) -> dict[str, Any] | None:
        """What a file holds; None if it is of another evaluation, or no journal at all."""
        try:
            state = torch.load(file, weights_only=True)
            if not isinstance(state, dict) or state.get("key") != self.key:
                return None
            return {"done": set(state["done"]), "tally": Tally.of_state(state)}
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError):
            return None


def _note(text: str) -> None:
    warnings.warn(text, ResumeNote, stacklevel=2)
