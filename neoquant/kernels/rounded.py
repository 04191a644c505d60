"""Kernels that round activations to int8 too: faster, most of all where many rows meet the weight, and not exact.

A row of activations is cut into runs of inputs, each of which is rounded to whole steps of a scale of its own, its
largest magnitude / 127. A run is as long as what shares a scale in every row of the weight, at most 128 inputs: an
outlier spoils its own run only. Values of a table are rounded to whole steps too (`Decoding.levels`), which moves those
of NF4 and FP4 by at most 0.004 of a block's absmax. So sums within a run are sums of integers, the same on every
machine.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from neoquant import packing
from neoquant.grids import Grid
from neoquant.kernels.base import State
from neoquant.kernels.cpu import Cpu
from neoquant.kernels.reference import Reference
from neoquant.native import products

LONGEST_RUN = 128
SMALLEST = 1e-30  # a run that does not reach this is all zero


class CpuInt8(Cpu):
    """The native library, in integers."""

    name: ClassVar[str] = "cpu-int8"
    activations: ClassVar[str] = "int8"

    def refuse(self, grid: Grid, shape: tuple[int, ...], device: torch.device, ordered: bool = False) -> str | None:
        if grid.decoding.trellis is not None:
            return f"the native library multiplies {grid.name} with activations as they are"
        if grid.decoding.table is not None and shape[1] % 8:
            return f"the native library multiplies integers in eights, not rows of {shape[1]} {grid.name} codes"
        return super().refuse(grid, shape, device, ordered)

    def _product(self, x: Tensor, w: products.Weight, bias: Tensor | None) -> Tensor:
        return products.multiply(x.float(), w, None if bias is None else bias.float(), int8=True).to(x.dtype)


class ReferenceInt8(Reference):
    """The same in plain torch, with whole numbers held as float32."""

    name: ClassVar[str] = "reference-int8"
    activations: ClassVar[str] = "int8"

    def linear(self, x: Tensor, state: State, grid: Grid, shape: tuple[int, ...], bias: Tensor | None) -> Tensor:
        if "order" in state:
            x = x.index_select(-1, state["order"])
        rounded = round_activations(x.detach().float(), run_length(grid, shape[1]))
        values = x.float() + (rounded - x.float()).detach()  # gradients pass as if nothing were rounded
        w = grid.decoding.decode(packing.unpack(state["codes"], grid.bits, shape[1]), state, whole_steps=True)
        return torch.nn.functional.linear(values, w, None if bias is None else bias.float()).to(x.dtype)


def run_length(grid: Grid, columns: int) -> int:
    """Activations that share a scale before a weight with so many columns."""
    width = grid.decoding.width(columns)
    if grid.decoding.flat:  # blocks may cross rows: what lies in one block in every row
        return next(n for n in (128, 64, 32, 16, 8, 4, 2, 1) if width % n == 0 and columns % n == 0)
    return LONGEST_RUN if width == columns else min(width, LONGEST_RUN)


def round_activations(x: Tensor, run: int) -> Tensor:
    """x float32[..., I] with each run of inputs rounded to 255 steps between its largest magnitude and minus that."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % run))
    runs = padded.view(*x.shape[:-1], -1, run)
    largest = runs.abs().amax(-1, keepdim=True)
    used = ~(largest < SMALLEST)  # what is not a number must not be lost
    steps = (runs * torch.where(used, 127 / largest, 0.0)).round_()
    return (steps * torch.where(used, largest / 127, 0.0)).view(padded.shape)[..., : x.shape[-1]]
