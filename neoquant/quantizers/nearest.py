"""Rounding to nearest: no data, no search, bitsandbytes' bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from neoquant.errors import FormatError
from neoquant.grids import Grid
from neoquant.quantizers.base import Quantizer
from neoquant.tensor import QuantizedTensor


@dataclass(frozen=True)
class Nearest(Quantizer):
    """Every weight to the nearest value of its grid."""

    name: ClassVar[str] = "nearest"
    needs_calibration: ClassVar[bool] = False

    def quantize(self, w: Tensor, grid: Grid, seen: Any = None, outputs: Tensor | None = None) -> QuantizedTensor:
        if w.dim() != 2 or not w.is_floating_point() or 0 in w.shape:
            raise FormatError(f"only floating-point matrices can be quantized, got {w.dtype} {list(w.shape)}")
        codes, params = grid.nearest(w)
        return QuantizedTensor(codes, grid, params, dtype=w.dtype)
