"""What a quantizer is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from neoquant.errors import FormatError, RequestError
from neoquant.grids import Grid
from neoquant.quantizers.hessian import Hessian
from neoquant.tensor import QuantizedTensor


class LayerReport(Protocol):
    """What happened to one layer, for records."""

    @property
    def seconds(self) -> float: ...
    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Quantizer(ABC):
    """Chooses codes and parameters on a grid. A plain value: its fields are the options that a recipe may state."""

    name: ClassVar[str]
    needs_calibration: ClassVar[bool] = False  # False: weights are enough, and tensors can be streamed one by one

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Names and defaults of the options."""
        return {field.name: field.default for field in fields(cls)}

    @property
    def stores_order(self) -> bool:
        """Whether its results carry an activation order (`desc_act`), which not every format holds."""
        return False

    @property
    def uses_output_hessian(self) -> bool:
        """Whether it makes use of `output_hessian`."""
        return False

    @property
    def needs_gradients(self) -> bool:
        """Whether `output_hessian` is to be that of the model's own loss, for which gradients are computed."""
        return False

    @property
    def needs_reference(self) -> bool:
        """Whether it makes use of `missing`, for which the unquantized model runs along."""
        return False

    @property
    def label(self) -> str:
        """The name, and what was chosen otherwise than by default: `gptq, order off`."""
        return ", ".join([self.name, *(f"{k} {v}" for k, v in asdict(self).items() if v != self.options()[k])])

    def describe(self) -> dict[str, Any]:
        """The name and every option as plain values; `make_quantizer` is the inverse."""
        return {"name": self.name, **asdict(self)}

    def refuse(self, grid: Grid) -> str | None:
        """Why this quantizer cannot round to `grid`, or None."""
        return None

    def sample_report(self, grid: Grid, before_attention: bool) -> LayerReport | None:
        """A report as long as those of `quantize_with_report`, for the sizes in a plan; None if there are none.

        `before_attention`: of a query, key or value layer.
        """
        return None

    def observer(self, in_features: int, device: torch.device | str = "cpu") -> Hessian | None:
        """What is shown a layer's inputs by `add(x[..., I])` and then given as `hessian`; None if nothing is needed."""
        return None

    def quantize(
        self,
        w: Tensor,
        grid: Grid,
        hessian: Hessian | None = None,
        output_hessian: Tensor | None = None,
        missing: Tensor | None = None,
    ) -> QuantizedTensor:
        """Round w[O, I] to `grid`.

        Args:
            hessian: what calibration gathered about the layer's inputs, if anything.
            output_hessian: by how much errors in the rows of each head matter together, float32[heads, D, D] with
                heads * D = O.
            missing: 2/n sum of e xᵀ over the inputs x, float32[O, I], where e is what the layer's output lacks.

        Raises:
            FormatError: w is not a floating-point matrix, or no grid can hold it.
            RequestError: the quantizer refuses this grid, or needs inputs that it was not shown.
        """
        return self.quantize_with_report(w, grid, hessian, output_hessian, missing)[0]

    def quantize_with_report(
        self,
        w: Tensor,
        grid: Grid,
        hessian: Hessian | None = None,
        output_hessian: Tensor | None = None,
        missing: Tensor | None = None,
    ) -> tuple[QuantizedTensor, LayerReport | None]:
        """The same, and a report of what happened; None if there is nothing to report."""
        if w.dim() != 2 or not w.is_floating_point() or 0 in w.shape:
            raise FormatError(f"only floating-point matrices can be quantized, got {w.dtype} {list(w.shape)}")
        if reason := self.refuse(grid):
            raise RequestError(reason)
        if self.needs_calibration and (hessian is None or hessian.columns != w.shape[1] or not hessian.rows):
            raise RequestError(f"{self.name} needs the layer's inputs: observe some first")
        return self._quantize(w, grid, hessian, output_hessian, missing)

    @abstractmethod
    def _quantize(
        self, w: Tensor, grid: Grid, hessian: Hessian | None, output_hessian: Tensor | None, missing: Tensor | None
    ) -> tuple[QuantizedTensor, LayerReport | None]:
        """`quantize_with_report` of what was checked: w is a floating-point matrix, on a grid that is not refused."""
