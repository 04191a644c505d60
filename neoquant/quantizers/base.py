"""What a quantizer is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from neoquant.grids import Grid
from neoquant.tensor import QuantizedTensor


class Quantizer(ABC):
    """Chooses codes and parameters on a grid."""

    name: ClassVar[str]
    needs_calibration: ClassVar[bool]  # False: weights are enough, and tensors can be streamed one by one

    def observer(self, columns: int, device: torch.device | str = "cpu") -> Any:
        """What is shown a layer's inputs by `add(x[..., I])` and then given as `seen`; None if nothing is needed."""
        return None

    @abstractmethod
    def quantize(self, w: Tensor, grid: Grid, seen: Any = None) -> QuantizedTensor:
        """Put w[O, I] on `grid`. `seen` is what calibration gathered about the layer's inputs, if anything.

        Raises FormatError for a weight that no grid can hold.
        """
