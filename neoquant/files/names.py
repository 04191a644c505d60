"""Names that are used as parts of paths, and the name that a path gives."""

from __future__ import annotations

import re
from pathlib import Path

from neoquant.errors import OutputError
from neoquant.files.writing import as_bytes

LEGAL_NAME = "letters, digits, '_', '.' and '-' only"


def is_safe_name(name: str) -> bool:
    """Whether a name can be a file's or a folder's without leading anywhere else: no separators, not `.` or `..`."""
    return re.fullmatch(r"[\w.-]+", name) is not None and name.strip(".") != "" and len(as_bytes(name)) <= 200


def as_text(name: str) -> str:
    """A name as UTF-8 can hold it: half a surrogate pair, by which Python spells a byte that is none, as an escape."""
    return as_bytes(name).decode()


def safe_name(text: str) -> str:
    """A name like `text` that is safe."""
    name = re.sub(r"[^\w.-]+", "-", text)
    return name if is_safe_name(name) else "unnamed"


def short_name(source: str | Path) -> str:
    """The last part of a folder, wherever `.` or a link leads, or of a hub id."""
    return Path(source).resolve().name if Path(source).exists() else str(source).rpartition("/")[2]


def output_folder(out: str | Path) -> Path:
    """Where a verb is to make a folder: behind `~` and links, absolute. Raises OutputError for what leads nowhere."""
    try:
        return resolved(Path(out).expanduser())
    except RuntimeError as error:  # nobody's home
        raise OutputError(f"{out} names no place for a folder: {error}") from None


def resolved(path: str | Path) -> Path:
    """The absolute path behind links. Raises OutputError for a loop of them, and for what is no path."""
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # Python 3.13 leaves a loop to who opens it
        raise OutputError(f"{path} leads nowhere: {error}") from None
