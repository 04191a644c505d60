"""How files leave the command line, and which files may be written."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from neoquant.cli.terminal import Terminal
from neoquant.errors import OutputError
from neoquant.files.locks import claim
from neoquant.files.names import resolved
from neoquant.files.writing import write_file

_BEGINNING = 4096  # bytes of a file that say what it is


class Kind(NamedTuple):
    """What a verb writes, and the pattern at the beginning of such a file by which it is known again."""

    name: str
    pattern: bytes


def json_kind(name: str) -> Kind:
    """Results with a `schema_version` of that name."""
    return Kind(f"a saved {name}", rb'\A\s*\{\s*"schema_version":\s*"neoquant\.' + name.encode() + rb"/")


PAGE = Kind("a page", rb'<meta name="generator" content="neoquant')
MARKDOWN = Kind("a report in Markdown", rb"\A<!-- neoquant: report -->")


def is_stdout(path: Path | None) -> bool:
    """Whether `-` was given for a file."""
    return str(path) == "-"


def check_output_file(
    path: Path | None,
    kind: Kind,
    terminal: Terminal,
    *,
    inputs: Iterable[str | Path | None] = (),
    force: bool = False,
) -> None:
    """Refuse a file that could not or should not be written, before the work that fills it.

    Args:
        path: the file, `-` for stdout, or None.
        kind: what will be written. A file of that kind is replaced, another one only with `force`.
        terminal: gives stdout to the file where that is `-`.
        inputs: what is read, files and folders; names that are neither are ids on the hub.
        force: replace a file of another kind.

    Raises:
        OutputError: its folder is missing or read-only, it is a folder itself, it is one of `inputs` or a file of a
            folder among them, it is there and of another kind, or another process is to write it.
    """
    if path is None:
        return
    if is_stdout(path):
        terminal.file_on_stdout = True
        return
    check_writable(path)
    if path.exists() and not path.is_file():
        return  # a device or a pipe
    _claim(path, terminal)
    if not path.exists():
        return
    for given in inputs:
        if given is not None and _belongs_to(path, Path(given), kind):
            raise OutputError(f"{path} is read as input, and would be lost: name another file to write")
    if not force and path.stat().st_size and not _is_of_kind(path, kind):
        raise OutputError(f"{path} exists and is not {kind.name}; choose another name, or replace it with --force")


def _claim(path: Path, terminal: Terminal) -> None:
    """Keep other processes from the file until the verb ends; of several that share one work the first one writes."""
    if int(os.environ.get("RANK", "0")):
        return
    give_back = claim(Path(os.path.realpath(path)))
    if give_back is None:
        raise OutputError(f"{path} is being written by another neoquant: name another file, or wait until it is done")
    terminal.at_end.append(give_back)


def check_writable(path: Path) -> None:
    """Raise OutputError where a file cannot be written: no folder, no permission, or a folder itself."""
    try:
        if path.is_dir():
            raise OutputError(f"{path} is a folder, name a file")
        if not path.parent.is_dir():
            raise OutputError(f"{path} cannot be written: there is no folder {path.parent}")
        if path.is_file():
            path.open("ab").close()
        elif not path.exists():
            tempfile.TemporaryFile(dir=path.parent).close()
    except (OSError, ValueError) as error:  # a name that is too long, a null byte in it, a loop of links
        raise OutputError(
            f"{path} cannot be written: {(getattr(error, 'strerror', None) or str(error)).lower()}"
        ) from None


def check_different(*paths: Path | None) -> None:
    """Raise OutputError where two outputs are one file."""
    named = [resolved(path) for path in paths if path is not None]
    for path in named:
        if named.count(path) > 1:
            raise OutputError(f"{path} is named for two outputs: name two files")


def write_text(path: Path, text: str, terminal: Terminal) -> None:
    """Write `text` to `path` (`-` is stdout), whole or not at all, and say so.

    Raises:
        OutputError: the file cannot be written.
    """
    if is_stdout(path):
        sys.stdout.write(text)
        return
    write_file(path, text)
    terminal.note(f"wrote {path}")


def _belongs_to(path: Path, given: Path, kind: Kind) -> bool:
    """Whether `path` is the input `given`, or a file of that folder which neoquant did not write as such an output."""
    try:
        if given.is_dir():
            return path.resolve().parent.samefile(given) and not _is_of_kind(path, kind)
        return given.exists() and path.samefile(given)
    except (OSError, ValueError):
        return False


def _is_of_kind(path: Path, kind: Kind) -> bool:
    try:
        with path.open("rb") as file:
            return re.search(kind.pattern, file.read(_BEGINNING)) is not None
    except OSError:
        return False
