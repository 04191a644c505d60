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
    activations: ClassVar[str] = "exact"  # or what it rounds them to

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

    @abstractmethod
    def embedding(self, ids: Tensor, state: State, grid: Grid, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Rows of the weight: int64 ids[...] to dtype[..., I], as `QuantizedTensor.dequantize` gives them.

        Raises IndexError for an id that is not 0 ... O - 1; on a GPU, that is an assertion of the device.
        """


def look_up(ids: Tensor, codes: Tensor, state: State, grid: Grid, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`Kernel.embedding` by the grid: `codes` uint8[N, I] are those of the `sources` of the flattened `ids`."""
    if ids.numel() == 0:
        return torch.empty(*ids.shape, shape[1], dtype=dtype, device=ids.device)
    values = grid.decode_rows(codes, {name: state[name] for name in grid.param_shapes(shape)}, ids.reshape(-1), dtype)
    if "order" in state:
        values = torch.empty_like(values).index_copy_(1, state["order"].long(), values)
    return values.view(*ids.shape, shape[1])


def require_ids(ids: Tensor, rows: int) -> None:
    """Raise IndexError unless every one of the ids is a row.

    A GPU asserts it itself, as torch's own embedding does: to know here would be to wait for it at every token.
    """
    if ids.device.type != "cpu":
        torch._assert_async(((ids >= 0) & (ids < rows)).all(), f"ids are 0 to {rows - 1}")
    elif ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= rows):
        raise IndexError(f"ids are 0 to {rows - 1}, got {int(ids.min())} to {int(ids.max())}")
