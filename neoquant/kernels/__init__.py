"""Kernels by name, the fastest first. A new one is a file here, a line in this table; the contract tests find it."""

from __future__ import annotations

import torch

from neoquant.grids import Grid
from neoquant.kernels.base import Kernel, State
from neoquant.kernels.bnb import Bitsandbytes
from neoquant.kernels.cpu import Cpu
from neoquant.kernels.reference import Reference

KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (Cpu(), Bitsandbytes(), Reference())}

__all__ = ["KERNELS", "Bitsandbytes", "Cpu", "Kernel", "Reference", "State", "choose"]


def choose(grid: Grid, shape: tuple[int, ...], device: torch.device, ordered: bool = False) -> Kernel:
    """The fastest kernel for a weight [O, I] there; `ordered` says that it has an activation order."""
    return next(kernel for kernel in KERNELS.values() if not kernel.refuse(grid, shape, device, ordered))
