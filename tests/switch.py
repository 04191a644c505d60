"""Runs tests on a chosen path of the native library."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from neoquant import native

every_isa = pytest.mark.parametrize("isa", [pytest.param(isa, marks=pytest.mark.isa(isa)) for isa in native.ISAS])
"""Each instruction set; those that this machine lacks are deselected, and counted in pytest's summary."""


@contextmanager
def forced(isa: str, threads: int | None = None) -> Iterator[None]:
    """Run on one instruction set (or `off`) and so many threads; skipped where this machine cannot."""
    if isa != "off" and isa not in native.runnable():
        pytest.skip(f"{isa} does not run here: {native.active().reason}")
    before, running = os.environ.get(native.SWITCH), torch.get_num_threads()
    os.environ[native.SWITCH] = isa
    native.active.cache_clear()
    torch.set_num_threads(threads or running)
    try:
        yield
    finally:
        torch.set_num_threads(running)
        os.environ.pop(native.SWITCH)
        if before is not None:
            os.environ[native.SWITCH] = before
        native.active.cache_clear()
