"""`neoquant quantize`."""

from __future__ import annotations

from neoquant.cli.options import Debug, Quiet
from neoquant.errors import NeoquantError


def quantize(quiet: Quiet = False, debug: Debug = False) -> None:
    """To be written."""
    raise NeoquantError("not written yet")
