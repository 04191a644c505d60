"""Answers to a harness's requests, kept in a file as they come, from which an interrupted run resumes.

A line of JSON each, after one that says of which models and versions they are: `["digest of tokens", nats, greedy]`.
A line that was cut off by the end of a process is answered again.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

from neoquant.errors import OutputError
from neoquant.evaluation.journal import ResumeNote
from neoquant.files.reading import parse_json
from neoquant.files.writing import write_file

_KIND = '{"neoquant": "answers/1", "key": '

Answer = tuple[float, bool]
"""-log p of a continuation in nats, and whether greedy decoding gives it."""


def digest(context: Sequence[int], continuation: Sequence[int]) -> str:
    """By which a request is known again: 24 hex digits of the SHA-256 of its tokens."""
    return hashlib.sha256(f"{list(context)}{list(continuation)}".encode()).hexdigest()[:24]


class Answers:
    """What a model, which `key` identifies, has answered; in a file, too, where `path` names one.

    Raises OutputError, and replaces nothing, where a file of that name holds something else.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self.path = path
        self._header = f"{_KIND}{json.dumps(key)}}}\n"
        self._known: dict[str, Answer] = {}
        if path is not None:
            self._restore(path)

    def get(self, request: str) -> Answer | None:
        """The answer to the request of that digest, if it is known."""
        return self._known.get(request)

    def add(self, answers: dict[str, Answer]) -> None:
        """Raises OutputError where the file cannot be written."""
        self._known.update(answers)
        if self.path is not None:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(_lines(answers))
            except OSError as error:
                raise OutputError(f"{self.path} cannot be written: {error.strerror}") from None

    def _restore(self, path: Path) -> None:
        if path.is_file() and path.stat().st_size:
            try:
                text = path.read_text("utf-8", errors="replace")
            except OSError as error:
                raise OutputError(f"{path} cannot be read: {error.strerror}") from None
            if not text.startswith(_KIND):
                raise OutputError(
                    f"{path} holds no answers of neoquant, and would be replaced: move it, or name another result"
                )
            if text.startswith(self._header):
                self._known = dict(filter(None, map(_parse, text.split("\n")[1:])))
                _note(f"resuming from {path}: {len(self._known)} requests are answered")
            else:
                _note(f"{path} is of another evaluation: starting from the beginning")
        write_file(path, self._header + _lines(self._known))


def _lines(answers: dict[str, Answer]) -> str:
    return "".join(f"{json.dumps([request, *answer])}\n" for request, answer in answers.items())


def _parse(line: str) -> tuple[str, Answer] | None:
    try:
        request, nats, greedy = parse_json(line)
        return str(request), (float(nats), bool(greedy))
    except (ValueError, TypeError):
        return None


def _note(text: str) -> None:
    warnings.warn(text, ResumeNote, stacklevel=3)
