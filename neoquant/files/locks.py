"""Locks on open folders and beside files, which die with their process: also on another machine or in another
container, where a process number says nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
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


def claim(path: Path) -> Callable[[], None] | None:
    """Claim a file that this process is to write: what gives the claim back; None where another process has it.

    The claim is a lock on an empty hidden file beside it. Where there are no locks, everybody gets it.
    """
    beside = path.with_name(f".{path.name}.lock")
    while True:
        try:
            descriptor = os.open(beside, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return lambda: None
        taken = take_lock(descriptor)
        if taken is False:
            os.close(descriptor)
            return None
        with suppress(OSError):  # or it went between opening and locking, with the process that had it
            if not taken or os.path.samestat(os.fstat(descriptor), beside.stat()):
                return lambda: _give_back(beside, descriptor)
        os.close(descriptor)


def _give_back(beside: Path, descriptor: int) -> None:
    with suppress(OSError):
        beside.unlink()
    os.close(descriptor)
