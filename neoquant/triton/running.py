"""Whether programs of Triton can run, and how they are launched."""

from __future__ import annotations

import os
import subprocess
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


@cache
def lacking() -> str | None:
    """Why Triton's programs cannot be compiled here, or, where there is a GPU, not be started; or None."""
    if find_spec("triton") is None:
        return "the package triton is not installed (torch brings it with CUDA; else pip install neoquant[triton])"
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        try:
            find_driver()
        except (AssertionError, RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            return f"Triton cannot start programs here, for which it needs a C compiler and Python's headers ({said})"
    return None


def find_driver() -> object:
    """What Triton starts programs with: a library that it compiles where it first runs."""
    from triton.runtime import driver

    return driver.active.utils


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
