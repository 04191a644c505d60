"""Counts and sizes in bytes, as people write and read them, and the memory that this process has held."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from neoquant.errors import RequestError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SHOWN = ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB"))


def parse_size(text: str | int, option: str, *, least: int = 1) -> int:
    """Bytes of `500MB`, `5GB`, `1.5GiB` or a plain number; `option` is whose value it is, for the message.

    Raises RequestError for what is not a size, or below `least`.
    """
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d*)?)\s*([a-zA-Z]*)\s*", str(text))
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found and found[2].upper() in _UNITS else -1
    if size < least:
        raise RequestError(f"{option} {text!r} is not a size; write it like 500MB, 5GB or 2GiB")
    return size


def size(count: float) -> str:
    """Bytes in the unit that people would use: `65.5 TB`, `838.1 MB`, `512 bytes`. Decimal, as hubs and disks count.

    Below 10 GB in megabytes, so that models beside each other have one unit.
    """
    for unit, name in _SHOWN:
        if count >= (1e10 if name == "GB" else 0.99995 * unit):
            return f"{count / unit:,.1f} {name}"
    return plural(round(count), "byte")


def plural(count: int, noun: str) -> str:
    """`1 document`, `1,234 documents`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


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
