"""bitsandbytes 8-bit: LLM.int8() weights, as transformers 5 with bitsandbytes 0.50 writes and reads them.

The byte level is docs/formats.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from neoquant.errors import FormatError
from neoquant.formats.base import Format, Layout, require_shape, require_suffixes, require_tensor
from neoquant.formats.bnb4 import bitsandbytes_config
from neoquant.grids import Grid, Int8Rows
from neoquant.tensor import QuantizedTensor

ROW_MAJOR = 0  # the only value of weight_format that is still written


class Bnb8(Format):
    """int8 linears."""

    name: ClassVar[str] = "bnb8"
    family: ClassVar[str] = "bitsandbytes"
    markers: ClassVar[tuple[str, ...]] = (".SCB",)
    stems: ClassVar[tuple[str, ...]] = (".weight", ".SCB")

    def refuse(self, grid: Grid, shape: tuple[int, ...]) -> str | None:
        return None if isinstance(grid, Int8Rows) else f"bitsandbytes' 8-bit format holds int8, not {grid.name}"

    def encode(self, q: QuantizedTensor) -> dict[str, Tensor]:
        self._require_holdable(q)
        return {
            ".weight": q.codes.view(torch.int8),
            ".SCB": q.params["scb"],
            ".weight_format": torch.tensor(ROW_MAJOR, dtype=torch.uint8),
        }

    def decode(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float16
    ) -> QuantizedTensor:
        suffixes = {".weight", ".SCB", ".weight_format"}
        require_suffixes(tensors, suffixes if ".weight_format" in tensors else suffixes - {".weight_format"})
        if ".weight_format" in tensors:
            require_tensor("weight_format", tensors[".weight_format"], torch.uint8, ())
            if (arrangement := int(tensors[".weight_format"])) != ROW_MAJOR:
                raise FormatError(f"weight_format must be {ROW_MAJOR} (rows), got {arrangement}")
        weight = tensors[".weight"]
        if weight.dim() != 2:
            raise FormatError(f"an 8-bit weight is int8 [O, I], got {weight.dtype} {list(weight.shape)}")
        stored = (weight.shape[0], weight.shape[1])
        require_tensor("weight", weight, torch.int8, stored)
        require_shape(stored, shape)
        return QuantizedTensor(weight.view(torch.uint8), Int8Rows(), {"scb": tensors[".SCB"]}, dtype=dtype)

    def layout(
        self, grid: Grid, shape: tuple[int, ...], dtype: torch.dtype = torch.float16, ordered: bool = False
    ) -> Layout:
        return {
            ".weight": (torch.int8, shape),
            ".SCB": grid.param_shapes(shape)["scb"],
            ".weight_format": (torch.uint8, ()),
        }

    def config(self, grids: Mapping[str, Grid], kept: Iterable[str], ordered: bool = False) -> dict[str, Any]:
        return bitsandbytes_config(Int8Rows(), kept)
