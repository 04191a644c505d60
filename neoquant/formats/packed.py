"""neoquant's own format: any grid, any order, several grids in one checkpoint.

The byte level is docs/formats.md. Every layer carries a small JSON header, so a tensor can be read without
config.json; rows start on a byte, so one row can be read without the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from neoquant import packing
from neoquant.errors import FormatError, RequestError
from neoquant.formats.base import (
    Format,
    Layout,
    dtype_from_name,
    dtype_name,
    json_from_tensor,
    json_to_tensor,
    require_shape,
    require_suffixes,
    require_tensor,
    shape_from_json,
)
from neoquant.grids import Grid, grid_from_dict
from neoquant.tensor import QuantizedTensor

VERSION = 1
HEADER = ".weight.neoquant"


class PackedFormat(Format):
    """Everything that neoquant can quantize."""

    name: ClassVar[str] = "packed"
    family: ClassVar[str] = "neoquant"
    markers: ClassVar[tuple[str, ...]] = (HEADER,)
    compute_key: ClassVar[str | None] = "compute_dtype"
    holds_order: ClassVar[bool] = True
    holds_dtype: ClassVar[bool] = True
    holds_embeddings: ClassVar[bool] = True

    def refuse(self, grid: Grid, shape: tuple[int, ...]) -> str | None:
        return None

    def encode(self, q: QuantizedTensor) -> dict[str, Tensor]:
        self._require_holdable(q)
        tensors = {
            ".weight": packing.pack(q.codes, q.grid.bits),
            HEADER: json_to_tensor(_header(q.grid, q.shape, q.dtype)),
        }
        tensors |= {f".weight.{name}": param for name, param in q.params.items()}
        return tensors if q.order is None else {**tensors, ".weight.order": q.order}

    def decode(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float16
    ) -> QuantizedTensor:
        if HEADER not in tensors:
            raise FormatError(f"the quantized weight lacks its header {HEADER.removeprefix('.')}")
        header = json_from_tensor(HEADER, tensors[HEADER])
        if header.get("version") != VERSION:
            raise FormatError(f"the weight's version is {header.get('version')!r}; this neoquant reads {VERSION}")
        grid, stored = _grid(header), shape_from_json(header.get("shape"))
        require_shape(stored, shape)
        order = tensors.get(".weight.order")
        layout = self.layout(grid, stored, ordered=order is not None)
        require_suffixes(tensors, layout)
        require_tensor("weight", tensors[".weight"], *layout[".weight"])
        codes = packing.unpack(tensors[".weight"], grid.bits, stored[1])
        params = {name: tensors[f".weight.{name}"] for name in grid.param_shapes(stored)}
        return QuantizedTensor(codes, grid, params, order, dtype_from_name(header.get("dtype")))

    def layout(
        self, grid: Grid, shape: tuple[int, ...], dtype: torch.dtype = torch.float16, ordered: bool = False
    ) -> Layout:
        header = json_to_tensor(_header(grid, shape, dtype))
        order: Layout = {".weight.order": (torch.int32, (shape[1],))} if ordered else {}
        return {
            ".weight": (torch.uint8, (shape[0], packing.row_bytes(shape[1], grid.bits))),
            HEADER: (torch.uint8, tuple(header.shape)),
            **{f".weight.{name}": param for name, param in grid.param_shapes(shape).items()},
            **order,
        }

    def config(self, grids: Mapping[str, Grid], kept: Iterable[str], ordered: bool = False) -> dict[str, Any]:
        not_converted = {"lm_head", *kept} - {layer.removeprefix("transformer.") for layer in grids}
        return {"quant_method": "neoquant", "version": VERSION, "modules_to_not_convert": sorted(not_converted)}


def _header(grid: Grid, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    return {"version": VERSION, "grid": grid.describe(), "shape": list(shape), "dtype": dtype_name(dtype)}


def _grid(header: dict[str, Any]) -> Grid:
    described = header.get("grid")
    if not isinstance(described, dict):
        raise FormatError(f"the weight's grid is an object, got {described!r}")
    try:
        return grid_from_dict(described)
    except RequestError as error:
        raise FormatError(str(error)) from error
