"""How files leave the command line."""

from __future__ import annotations

import os
from pathlib import Path

from neoquant.cli.terminal import Terminal
from neoquant.errors import OutputError


def check_writable(path: Path | None) -> None:
    """Refuse a result file that could not be written, before the work that fills it.

    Raises:
        OutputError: its folder is missing or read-only, or it is a folder itself.
    """
    if path is None:
        return
    if path.is_dir():
        raise OutputError(f"{path} is a folder, name a file")
    if not path.parent.is_dir():
        raise OutputError(f"{path} cannot be written: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OutputError(f"{path} cannot be written: permission denied")


def write_text(path: Path, text: str, terminal: Terminal) -> None:
    """Write `text` to `path` and say so.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error
    terminal.note(f"wrote {path}")
