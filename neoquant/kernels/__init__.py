"""Kernels by name, the fastest first. A new one is a file here, a line in this table; the contract tests find it."""

from __future__ import annotations

import torch

from neoquant.grids import Grid
from neoquant.kernels.base import Kernel, State
from neoquant.kernels.bnb import Bitsandbytes
from neoquant.kernels.cpu import Cpu
from neoquant.kernels.reference import Reference
from neoquant.kernels.rounded import CpuInt8, ReferenceInt8
from neoquant.kernels.triton import Triton, TritonInt8

KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (Cpu(), Triton(), Bitsandbytes(), Reference())}
ROUNDING: dict[str, Kernel] = {kernel.name: kernel for kernel in (CpuInt8(), TritonInt8(), ReferenceInt8())}
"""Kernels that are not exact, and are taken only where somebody asks for it."""

ACTIVATIONS = ("exact", *dict.fromkeys(kernel.activations for kernel in ROUNDING.values()))

__all__ = [
    "ACTIVATIONS",
    "KERNELS",
    "ROUNDING",
    "Bitsandbytes",
    "Cpu",
    "CpuInt8",
    "Kernel",
    "Reference",
    "ReferenceInt8",
    "State",
    "Triton",
    "TritonInt8",
    "choose",
]


def choose(
    grid: Grid, shape: tuple[int, ...], device: torch.device, ordered: bool = False, activations: str = "exact"
) -> Kernel:
    """The fastest kernel for a weight [O, I] there; `ordered` says that it has an activation order, `activations` what
    may be done to what it is multiplied with, one of ACTIVATIONS."""
    every = (*KERNELS.values(), *ROUNDING.values())
    return next(
        kernel
        for kernel in every
        if kernel.activations == activations and not kernel.refuse(grid, shape, device, ordered)
    )
