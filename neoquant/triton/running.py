"""Whether programs of Triton can run, and how they are launched."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


@cache
def lacking() -> str | None:
    """Why Triton's programs cannot be compiled here, or None."""
    if find_spec("triton") is None:
        return "the package triton is not installed (torch brings it with CUDA; else pip install neoquant[triton])"
    return None


def run(program: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, Any]) -> None:
    """Launch a program where its tensors lie: Triton itself launches on the current device, whichever that is."""
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        launch(program, grid, arguments, options)


def launch(program: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, Any]) -> None:
    """Launch a program on the current device; what stands in for a GPU intercepts here."""
    program[grid](**arguments, **options)


def power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << max(0, n - 1).bit_length()
