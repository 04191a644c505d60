"""The simulated device for a single test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from simulated_cuda.device import Counts, simulate
from simulated_cuda.guard import NoCompilerError, load_guard


@pytest.fixture
def gpu() -> Iterator[Counts]:
    """There is a CUDA device, which counts what it is asked for."""
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is there, and cannot be simulated beside")
    try:
        load_guard()
    except NoCompilerError as reason:
        pytest.skip(str(reason))
    with simulate() as counts:
        yield counts
