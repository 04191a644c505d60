"""Bytes: sizes as people write them, and the memory that this process has held."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from neoquant.errors import RequestError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str | int, option: str, *, least: int = 1) -> int:
    """Bytes of `500MB`, `5GB`, `1.5GiB` or a plain number; `option` is whose value it is, for the message.

    Raises RequestError for what is not a size, or below `least`.
    """
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d*)?)\s*([a-zA-Z]*)\s*", str(text))
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found and found[2].upper() in _UNITS else -1
    if size < least:
        raise RequestError(f"{option} {text!r} is not a size; write it like 500MB, 5GB or 2GiB")
    return size


def peak_rss_bytes() -> int:
    """The most memory this process has held at any time since it started."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts the parent of a forked process as well
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if line is not None:
            return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        import psutil  # type: ignore[import-untyped]

        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
