"""`neoquant plan`."""

from __future__ import annotations

from neoquant.cli.options import Debug, Quiet
from neoquant.errors import NeoquantError


def plan(quiet: Quiet = False, debug: Debug = False) -> None:
    """To be written."""
    raise NeoquantError("not written yet")
