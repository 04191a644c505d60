"""What a quantizer is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from neoquant.grids import Grid
from neoquant.tensor import QuantizedTensor


@dataclass(frozen=True)
class Quantizer(ABC):
    """Chooses codes and parameters on a grid. A plain value: its fields are the options that a recipe may state."""

    name: ClassVar[str]
    needs_calibration: ClassVar[bool]  # False: weights are enough, and tensors can be streamed one by one

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Names and defaults of the options."""
        return {field.name: field.default for field in fields(cls)}

    @property
    def gives_order(self) -> bool:
        """Whether its results carry an activation order, which not every format holds."""
        return False

    @property
    def label(self) -> str:
        """The name, and what was chosen otherwise than by default: `gptq, order off`."""
        return ", ".join([self.name, *(f"{k} {v}" for k, v in asdict(self).items() if v != self.options()[k])])

    def describe(self) -> dict[str, Any]:
        """The name and every option as plain values; `make_quantizer` is the inverse."""
        return {"name": self.name, **asdict(self)}

    def observer(self, columns: int, device: torch.device | str = "cpu") -> Any:
        """What is shown a layer's inputs by `add(x[..., I])` and then given as `seen`; None if nothing is needed."""
        return None

    @property
    def weighs_outputs(self) -> bool:
        """Whether it makes use of `outputs`."""
        return False

    @abstractmethod
    def quantize(self, w: Tensor, grid: Grid, seen: Any = None, outputs: Tensor | None = None) -> QuantizedTensor:
        """Put w[O, I] on `grid`.

        Args:
            seen: what calibration gathered about the layer's inputs, if anything.
            outputs: by how much errors in the rows of each head matter together, float32[heads, O / heads, O / heads].

        Raises FormatError for a weight that no grid can hold.
        """

    def run(
        self, w: Tensor, grid: Grid, seen: Any = None, outputs: Tensor | None = None
    ) -> tuple[QuantizedTensor, Any]:
        """The same, and a report of what happened, with `to_dict()`; None if there is nothing to report."""
        return self.quantize(w, grid, seen, outputs), None
