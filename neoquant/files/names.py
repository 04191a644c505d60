"""Names that are used as parts of paths, and the name that a path gives."""

from __future__ import annotations

import re
from pathlib import Path

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
