"""Read files within bounds: regular files only, no longer than they can sensibly be.

Configurations, recipes, indices and results come from anywhere. A device, a pipe or a huge file in their place would
hang the process or fill its memory.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

from neoquant.errors import CheckpointError, NeoquantError, RequestError, locate
from neoquant.sizes import parse_size

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_BYTES = 1 << 24
"""Of a file that people write: configuration, recipe, suite."""

MAX_LARGE_BYTES = 1 << 28
"""Of a file that programs write: index, tokenizer, result."""

VARIABLE = "NEOQUANT_MAX_FILE_SIZE"
"""Environment variable that takes the place of both limits, like `2GB`."""


def size_limit(default: int) -> int:
    """The bytes that may be read of a file: `default`, or what the environment says."""
    stated = os.environ.get(VARIABLE)
    return parse_size(stated, VARIABLE) if stated else default


def check_size(path: Path, limit: int = MAX_BYTES) -> None:
    """Refuse what is no regular file, or too long to be read whole.

    Raises:
        OSError: there is no such file.
        CheckpointError: it is a device, a pipe or a folder, or longer than `limit`.
    """
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise CheckpointError("is a folder, expected a file")
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError("is a device or a pipe, expected a regular file")
    if found.st_size > (limit := size_limit(limit)):
        raise CheckpointError(
            f"has {found.st_size:,} bytes, and at most {limit:,} are read; set {VARIABLE} to read more"
        )


def read_bytes(path: str | Path, *, limit: int = MAX_BYTES, error: type[NeoquantError] = CheckpointError) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises `error`, which names the file."""
    path = Path(path)
    with locate(str(path)):
        try:
            check_size(path, limit)
            return path.read_bytes()
        except FileNotFoundError:
            raise error("there is no such file") from None
        except RequestError:  # of the variable, which is a ValueError, too
            raise
        except OSError as problem:
            raise error(f"cannot be read ({problem.strerror or problem})") from None
        except ValueError as problem:  # a null byte in the name
            raise error(f"cannot be read ({problem})") from None
        except CheckpointError as problem:
            raise error(problem.message) from None


def read_text(path: str | Path, *, limit: int = MAX_BYTES, error: type[NeoquantError] = CheckpointError) -> str:
    """The text of a regular UTF-8 file of at most `limit` bytes. Raises `error`, which names the file."""
    content = read_bytes(path, limit=limit, error=error)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{path}: cannot be read as UTF-8 ({problem.reason} at byte {problem.start})") from None


def parse_json(text: str | bytes) -> Any:
    """The value that JSON spells. Raises ValueError for all that is none, nesting beyond Python's limit included."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: str | Path, *, limit: int = MAX_BYTES, error: type[NeoquantError] = CheckpointError) -> Any:
    """The value of a JSON file. Raises `error`, which names the file."""
    text = read_text(path, limit=limit, error=error)
    try:
        return parse_json(text)
    except ValueError as problem:
        raise error(f"{path}: not JSON ({problem})") from None


def read_toml(path: str | Path, *, error: type[NeoquantError] = CheckpointError) -> dict[str, Any]:
    """The table of a TOML file. Raises `error`, which names the file."""
    text = read_text(path, error=error)
    try:
        table: dict[str, Any] = tomllib.loads(text)
        return table
    except RecursionError:
        raise error(f"{path}: is not TOML: it is nested too deeply") from None
    except ValueError as problem:
        raise error(f"{path}: is not TOML: {problem}") from None
