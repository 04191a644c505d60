"""`neoquant info`."""

from __future__ import annotations

from neoquant.cli.options import Debug, Quiet
from neoquant.errors import NeoquantError


def info(quiet: Quiet = False, debug: Debug = False) -> None:
    """To be written."""
    raise NeoquantError("not written yet")
