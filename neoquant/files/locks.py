"""Locks on open folders, which die with their process: also on another machine or in another container, where a
process number says nothing."""

from __future__ import annotations

import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def open_folder(folder: Path) -> int | None:
    """A descriptor of a folder; None where the system opens none (Windows).

    Raises:
        OSError: it is not there, or may not be read.
    """
    if os.name == "nt":
        folder.stat()
        return None
    return os.open(folder, os.O_RDONLY)


def close_folder(descriptor: int | None) -> None:
    """Close it, and with it give back its lock."""
    if descriptor is not None:
        os.close(descriptor)


def take_lock(descriptor: int | None) -> bool | None:
    """Lock an open folder until it is closed: True; False where another process holds it; None where there are no
    locks, by the system or by the file system."""
    if fcntl is None or descriptor is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
