"""The simulated device for a single test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from simulated_cuda.device import Counts, simulate
from simulated_cuda.guard import NoCompilerError, load_guard


@pytest.fixture
def can_be_simulated() -> None:
    """Skips where there is a real device, or no compiler for the simulated one's guard."""
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is there, and cannot be simulated beside")
    try:
        load_guard()
    except NoCompilerError as reason:
        pytest.skip(str(reason))


@pytest.fixture
def gpu(can_be_simulated: None) -> Iterator[Counts]:
    """There is a CUDA device, which counts what it is asked for."""
    with simulate() as counts:
        yield counts
