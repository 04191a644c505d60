"""The one value in which grids, quantizers, formats and kernels meet."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from neoquant.errors import FormatError
from neoquant.grids import Grid, Params


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight [O, I] on a grid.

    codes   uint8[O, I]
    params  the grid's parameters, as they are stored
    order   int32[I] or None: column j of `codes` is input feature order[j] (activation order); None is 0, 1, 2, ...
    dtype   what the weight was before, and what `dequantize` gives

    Raises FormatError where these do not fit together.
    """

    codes: Tensor
    grid: Grid
    params: Params
    order: Tensor | None = None
    dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.uint8 or self.codes.dim() != 2 or 0 in self.codes.shape:
            raise FormatError(f"codes are uint8 [O, I], got {self.codes.dtype} {list(self.codes.shape)}")
        if not self.dtype.is_floating_point:
            raise FormatError(f"a weight has a floating-point type, got {self.dtype}")
        if self.grid.bits < 8 and int(self.codes.max()) >> self.grid.bits:
            raise FormatError(f"codes of {self.grid.name} end at {2**self.grid.bits - 1}, got {int(self.codes.max())}")
        self.grid.check(self.params, self.shape)
        if self.order is not None:
            self._check_order(self.order)

    def _check_order(self, order: Tensor) -> None:
        columns = self.shape[1]
        if order.dtype != torch.int32 or order.shape != (columns,):
            raise FormatError(f"order is int32 [{columns}], got {order.dtype} {list(order.shape)}")
        if not torch.equal(order.sort().values, torch.arange(columns, dtype=torch.int32, device=order.device)):
            raise FormatError(f"order must hold each of 0 to {columns - 1} once")

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, dtype[O, I] (`self.dtype` if None), its columns in their natural order."""
        w = self.grid.decode(self.codes, self.params, dtype or self.dtype)
        return w if self.order is None else torch.empty_like(w).index_copy_(1, self.order.long(), w)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same bits on another device; this value itself where they are there already."""
        if self.codes.device == torch.device(device):
            return self
        params = {name: tensor.to(device) for name, tensor in self.params.items()}
        order = None if self.order is None else self.order.to(device)
        return replace(self, codes=self.codes.to(device), params=params, order=order)

    def equals(self, other: QuantizedTensor) -> bool:
        """Whether both hold the same bits."""
        if (self.grid, self.dtype, self.order is None) != (other.grid, other.dtype, other.order is None):
            return False
        pairs = [(self.codes, other.codes), *((self.params[name], other.params[name]) for name in self.params)]
        if self.order is not None and other.order is not None:
            pairs.append((self.order, other.order))
        return all(torch.equal(mine, theirs) for mine, theirs in pairs)
