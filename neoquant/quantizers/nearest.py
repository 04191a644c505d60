"""Round-to-nearest (RTN): no calibration, no search; bitsandbytes' bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from neoquant.grids import Grid
from neoquant.quantizers.base import Quantizer
from neoquant.quantizers.hessian import Hessian
from neoquant.tensor import QuantizedTensor


@dataclass(frozen=True)
class Nearest(Quantizer):
    """Every weight to the nearest value of its grid."""

    name: ClassVar[str] = "nearest"

    def _quantize(
        self, w: Tensor, grid: Grid, hessian: Hessian | None, output_hessian: Tensor | None, missing: Tensor | None
    ) -> tuple[QuantizedTensor, None]:
        codes, params = grid.nearest(w)
        return QuantizedTensor(codes, grid, params, dtype=w.dtype), None
