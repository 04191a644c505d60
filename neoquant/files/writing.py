"""Write a file whole or not at all.

The content goes into a temporary file in the same folder, which is synced and then renamed over the old one. A
process that is killed, or a disk that fills up, leaves the old file as it was.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from neoquant.errors import OutputError
from neoquant.files.locks import close_folder, open_folder

TEMPORARY = ".new"
"""How the name of a temporary file ends."""


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the place of `path` when the block ends without an error.

    The mode of a file that is replaced is kept, a link keeps pointing where it does. A device or a pipe is written to
    directly. Raises OutputError where the file cannot be written.
    """
    with explaining(path):
        target = Path(os.path.realpath(path))
        old = target.stat() if target.exists() else None
        if old is not None and not stat.S_ISREG(old.st_mode):
            with target.open("wb") as device:
                yield device
            return
        if old is not None:
            target.open("ab").close()  # a file that may not be written is not replaced either
        temporary = target.with_name(f".{target.name[:40]}.{secrets.token_hex(4)}{TEMPORARY}")
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                if old is not None:
                    temporary.chmod(stat.S_IMODE(old.st_mode))
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(target.parent)


def write_file(path: str | Path, content: str | bytes) -> None:
    """Write all of `content` to `path`, as `replacing` does."""
    with replacing(path) as file:
        file.write(as_bytes(content))


def as_bytes(content: str | bytes) -> bytes:
    """Text as UTF-8; half a surrogate pair, which a file's name may hold and UTF-8 does not, as an escape."""
    return content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = open_folder(folder)
    if descriptor is None:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system without it
            raise
    finally:
        close_folder(descriptor)


@contextmanager
def explaining(path: str | Path) -> Iterator[None]:
    """Turn an OSError into an OutputError that names `path`."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        raise OutputError(f"{path} cannot be written: {reason}") from error
