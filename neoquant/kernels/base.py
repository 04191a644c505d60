"""What a kernel is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from neoquant.grids import Grid
from neoquant.tensor import QuantizedTensor

State = dict[str, Tensor]  # what a layer holds for its kernel; the kernel chooses the names


class Kernel(ABC):
    """Multiplies with a quantized weight that it holds in an arrangement of its own."""

    name: ClassVar[str]

    @abstractmethod
    def refuse(self, grid: Grid, shape: tuple[int, ...], device: torch.device, ordered: bool = False) -> str | None:
        """Why this kernel cannot run a weight [O, I] on `grid` there, or None; `ordered`: with an activation order."""

    @abstractmethod
    def pack(self, q: QuantizedTensor) -> State:
        """The weight as this kernel wants it, on the device that `q` is on."""

    @abstractmethod
    def unpack(self, state: State, grid: Grid, shape: tuple[int, ...], dtype: torch.dtype) -> QuantizedTensor:
        """The inverse of `pack`, bit for bit."""

    @abstractmethod
    def linear(self, x: Tensor, state: State, grid: Grid, shape: tuple[int, ...], bias: Tensor | None) -> Tensor:
        """x[..., I] times the weight's transpose, plus bias[O]: [..., O], computed in x's type."""
