"""bitsandbytes 4-bit: NF4 and FP4, as transformers 5 with bitsandbytes 0.50 writes and reads them.

The byte level is docs/formats.md. Each layer states its own block size and type, so one checkpoint may mix them;
config.json has room for one and names the commonest.
"""

from __future__ import annotations

from collections import Counter
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
from neoquant.grids import NESTED_GROUP, Codebook, Grid, Params, double_quant_table
from neoquant.model.names import BASE_PREFIX
from neoquant.tensor import QuantizedTensor

STATE = ".weight.quant_state.bitsandbytes__"
LONGEST_FLOAT = 1.2345678901234567e-05  # no float of a nested_offset takes more JSON than this


class Bnb4(Format):
    """NF4 and FP4 linears."""

    name: ClassVar[str] = "bnb4"
    family: ClassVar[str] = "bitsandbytes"
    markers: ClassVar[tuple[str, ...]] = (f"{STATE}nf4", f"{STATE}fp4")
    holds_dtype: ClassVar[bool] = True
    compute_key: ClassVar[str | None] = "bnb_4bit_compute_dtype"

    def refuse(self, grid: Grid, shape: tuple[int, ...]) -> str | None:
        if not isinstance(grid, Codebook):
            return f"bitsandbytes' 4-bit format holds nf4 and fp4, not {grid.name}"
        return None

    def caution(self, grid: Grid, shape: tuple[int, ...]) -> str | None:
        if not isinstance(grid, Codebook) or grid.block_size >= 2048:
            return None
        if shape[1] % grid.block_size == 0 or shape[1] % 16:
            return None
        return (
            f"blocks of {grid.block_size} cross rows of {shape[1]}, which bitsandbytes decodes wrongly on CPUs with "
            f"AVX-512 (neoquant and CUDA do not); a block size that divides {shape[1]} avoids it"
        )

    def encode(self, q: QuantizedTensor) -> dict[str, Tensor]:
        self._require_holdable(q)
        assert isinstance(q.grid, Codebook)
        tensors = {
            ".weight": packing.pack_nibbles(q.codes.reshape(-1), pad=q.grid.zero_code).unsqueeze(1),
            ".weight.absmax": q.params["absmax"],
            ".weight.quant_map": q.grid.table().clone(),
        }
        offset = None
        if q.grid.double_quant:
            tensors[".weight.nested_absmax"] = q.params["nested_absmax"]
            tensors[".weight.nested_quant_map"] = double_quant_table(torch.device("cpu")).clone()
            offset = q.params["nested_offset"].item()
        tensors[STATE + q.grid.kind] = json_to_tensor(_state(q.grid, q.shape, q.dtype, offset))
        return tensors

    def decode(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float16
    ) -> QuantizedTensor:
        markers = [marker for marker in self.markers if marker in tensors]
        if len(markers) != 1:
            raise FormatError(f"a 4-bit weight has one quant_state.bitsandbytes__nf4 or __fp4, got {len(markers)}")
        state = json_from_tensor(markers[0], tensors[markers[0]])
        grid = _grid(state)
        if markers[0] != STATE + grid.kind:
            raise FormatError(f"{markers[0].removeprefix('.')} says that its type is {grid.kind}")
        stored = shape_from_json(state.get("shape"))
        require_shape(stored, shape)
        require_suffixes(tensors, self.layout(grid, stored))
        _require_table(".weight.quant_map", tensors, grid.table())
        params: Params = {"absmax": tensors[".weight.absmax"]}
        if grid.double_quant:
            _require_table(".weight.nested_quant_map", tensors, double_quant_table(torch.device("cpu")))
            params["nested_absmax"] = tensors[".weight.nested_absmax"]
            params["nested_offset"] = torch.tensor(state["nested_offset"], dtype=torch.float32)
        codes = _codes(tensors[".weight"], stored)
        return QuantizedTensor(codes, grid, params, dtype=dtype_from_name(state.get("dtype")))

    def layout(
        self, grid: Grid, shape: tuple[int, ...], dtype: torch.dtype = torch.float16, ordered: bool = False
    ) -> Layout:
        assert isinstance(grid, Codebook)
        params = grid.param_shapes(shape)
        layout: Layout = {
            ".weight": (torch.uint8, (packing.row_bytes(shape[0] * shape[1], 4), 1)),
            ".weight.absmax": params["absmax"],
            ".weight.quant_map": (torch.float32, (16,)),
        }
        if grid.double_quant:
            layout[".weight.nested_absmax"] = params["nested_absmax"]
            layout[".weight.nested_quant_map"] = (torch.float32, (256,))
        state = _state(grid, shape, dtype, LONGEST_FLOAT if grid.double_quant else None)
        layout[STATE + grid.kind] = (torch.uint8, tuple(json_to_tensor(state).shape))
        return layout

    def config(self, grids: Mapping[str, Grid], kept: Iterable[str], ordered: bool = False) -> dict[str, Any]:
        codebooks = [grid for grid in grids.values() if isinstance(grid, Codebook)]
        grid = Counter(codebooks).most_common(1)[0][0] if codebooks else Codebook()
        return bitsandbytes_config(grid, kept)


def bitsandbytes_config(grid: Grid, kept: Iterable[str]) -> dict[str, Any]:
    """The fields that transformers 5 writes for bitsandbytes; `grid` says which of them matter.

    The compute type is float32, transformers' own default: half-precision activations are then multiplied exactly,
    and a model that is loaded in float32 computes in it. Layers that are kept stand there by both their names:
    transformers 5 compares the ends of names, transformers 4 whole ones, which have a prefix in all models with a head.
    """
    kept = list(kept)
    prefixed = (f"{BASE_PREFIX}{name}" for name in kept if name.startswith("h."))
    codebook = grid if isinstance(grid, Codebook) else None
    return {
        "_load_in_4bit": codebook is not None,
        "_load_in_8bit": codebook is None,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": codebook.kind if codebook else "fp4",
        "bnb_4bit_use_double_quant": codebook is not None and codebook.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": sorted({"lm_head", *kept, *prefixed}),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": codebook is not None,
        "load_in_8bit": codebook is None,
        "quant_method": "bitsandbytes",
    }


def _state(grid: Codebook, shape: tuple[int, ...], dtype: torch.dtype, offset: float | None) -> dict[str, Any]:
    """The JSON object of a layer, in bitsandbytes' order of keys; `offset` under double quantization only."""
    state = {
        "quant_type": grid.kind,
        "blocksize": grid.block_size,
        "dtype": dtype_name(dtype),
        "shape": list(shape),
    }
    if offset is not None:
        nested = {"nested_blocksize": NESTED_GROUP, "nested_dtype": "float32", "nested_offset": offset}
        state.update(nested)
    return state


def _grid(state: dict[str, Any]) -> Codebook:
    nested = "nested_offset" in state
    if nested and state.get("nested_blocksize") != NESTED_GROUP:
        raise FormatError(f"nested_blocksize must be {NESTED_GROUP}, got {state.get('nested_blocksize')!r}")
    if nested and not isinstance(state["nested_offset"], float):
        raise FormatError(f"nested_offset is a number, got {state['nested_offset']!r}")
    try:
        return Codebook(state.get("quant_type"), state.get("blocksize"), nested)  # type: ignore[arg-type]
    except RequestError as error:
        raise FormatError(f"quant_state: {error}") from error


def _require_table(name: str, tensors: Mapping[str, Tensor], table: Tensor) -> None:
    """Refuse a table of values that is not the grid's: bitsandbytes' own kernels would ignore it."""
    found = tensors[name]
    require_tensor(name.removeprefix("."), found, torch.float32, tuple(table.shape))
    if not torch.allclose(found, table, rtol=0, atol=1e-6):
        raise FormatError(f"{name.removeprefix('.')} is not the table of values that this type has")


def _codes(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """uint8[O, I] from the stored bytes, which transformers may have written as another type of the same bytes."""
    n = shape[0] * shape[1]
    packed = weight.contiguous().view(-1).view(torch.uint8)
    if packed.numel() != packing.row_bytes(n, 4):
        raise FormatError(f"a 4-bit weight {list(shape)} takes {packing.row_bytes(n, 4)} bytes, got {packed.numel()}")
    return packing.unpack_nibbles(packed, n).view(shape)
