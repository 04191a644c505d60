"""compressed-tensors "pack-quantized", as llm-compressor writes and transformers and vLLM read it: affine grids of one
kind in a checkpoint.

The byte level is docs/formats.md. The format says nothing of a layer beside its tensors; bits, group size and symmetry
stand in config.json, in groups of layers. An activation order (`weight_g_idx`, actorder "group") is read, but not
written: the format dropped it in version 0.20.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from neoquant import packing
from neoquant.errors import FormatError, RequestError
from neoquant.formats.base import Format, Layout, require_shape, require_suffixes, require_tensor, shape_from_json
from neoquant.formats.int32_packing import half_scales, order_of, to_bytes, to_words, word_count
from neoquant.grids import Affine, Grid
from neoquant.tensor import QuantizedTensor

PACKED = "pack-quantized"
VERSION = "0.20.0"  # of the field's own reader and writer that this was held against
WIDTHS = (2, 4, 8)  # 3 bits are packed in two ways, by the reader's version


class CompressedTensors(Format):
    """Affine linears whose groups divide their rows."""

    name: ClassVar[str] = "compressed-tensors"
    family: ClassVar[str] = "compressed-tensors"
    markers: ClassVar[tuple[str, ...]] = (".weight_packed",)

    def __init__(self, said: Mapping[str, Any] | None = None) -> None:
        """`said` is the `quantization_config` of the checkpoint to be read: the tensors alone do not say everything."""
        self.said = dict(said or {})

    def configured(self, said: Mapping[str, Any]) -> Format:
        return CompressedTensors(said)

    def refuse(self, grid: Grid, shape: tuple[int, ...]) -> str | None:
        if not isinstance(grid, Affine):
            return f"compressed-tensors holds affine grids, not {grid.name}"
        if grid.float_zero:
            return "compressed-tensors stores zeros among the codes, not as float16; format neoquant holds them"
        if grid.bits not in WIDTHS:
            return f"compressed-tensors holds 2, 4 or 8 bits, not {grid.bits}, which its versions pack differently"
        if grid.group_size != -1 and shape[1] % grid.group_size:
            return (
                f"compressed-tensors needs groups that divide a row, and {grid.group_size} does not divide {shape[1]}"
            )
        return None

    def refuse_all(self, grids: Mapping[str, Grid]) -> str | None:
        kinds = list(dict.fromkeys(grids.values()))
        if len(kinds) > 1:
            return f"transformers reads one grid from a compressed-tensors checkpoint, not {kinds[0]} and {kinds[1]}"
        return None

    def encode(self, q: QuantizedTensor) -> dict[str, Tensor]:
        self._require_holdable(q)
        assert isinstance(q.grid, Affine)
        tensors = {
            ".weight_packed": to_words(q.codes, q.grid.bits),
            ".weight_scale": q.params["scale"],
            ".weight_shape": torch.tensor(q.shape, dtype=torch.int64),
        }
        if not q.grid.symmetric:
            tensors[".weight_zero_point"] = to_words(q.params["zero"].T, q.grid.bits).T.contiguous()
        return tensors

    def decode(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float16
    ) -> QuantizedTensor:
        if missing := [name for name in ("packed", "scale", "shape") if f".weight_{name}" not in tensors]:
            raise FormatError(f"the quantized weight lacks {', '.join(f'weight_{name}' for name in missing)}")
        require_tensor("weight_shape", tensors[".weight_shape"], torch.int64, (2,))
        stored = shape_from_json(tensors[".weight_shape"].tolist())
        require_shape(stored, shape)
        grid = self._grid(tensors, stored)
        tensors = _with_packed_zeros(tensors, grid)
        ordered = ".weight_g_idx" in tensors
        layout = self.layout(grid, stored, ordered=ordered)
        require_suffixes(tensors, layout)
        for suffix, spec in layout.items():
            if suffix != ".weight_scale":
                require_tensor(suffix.removeprefix("."), tensors[suffix], *spec)
        codes = _unpack(tensors[".weight_packed"], grid.bits, stored[1])
        scale = half_scales("weight_scale", tensors[".weight_scale"], layout[".weight_scale"][1])
        params = {"scale": scale}
        if not grid.symmetric:
            params["zero"] = _unpack(tensors[".weight_zero_point"].T, grid.bits, stored[0]).T.contiguous()
        order = order_of("weight_g_idx", tensors[".weight_g_idx"], grid.width(stored[1])) if ordered else None
        codes = codes if order is None else codes[:, order.long()].contiguous()
        return QuantizedTensor(codes, grid, params, order, dtype)

    def layout(
        self, grid: Grid, shape: tuple[int, ...], dtype: torch.dtype = torch.float16, ordered: bool = False
    ) -> Layout:
        assert isinstance(grid, Affine)
        scale = grid.param_shapes(shape)["scale"]
        layout: Layout = {
            ".weight_packed": (torch.int32, (shape[0], word_count(shape[1], grid.bits))),
            ".weight_scale": scale,
            ".weight_shape": (torch.int64, (2,)),
        }
        if not grid.symmetric:
            layout[".weight_zero_point"] = (torch.int32, (word_count(shape[0], grid.bits), scale[1][1]))
        if ordered:
            layout[".weight_g_idx"] = (torch.int32, (shape[1],))
        return layout

    def config(self, grids: Mapping[str, Grid], kept: Iterable[str], ordered: bool = False) -> dict[str, Any]:
        grid = next((grid for grid in grids.values() if isinstance(grid, Affine)), Affine(symmetric=True))
        weights = {
            "num_bits": grid.bits,
            "type": "int",
            "symmetric": grid.symmetric,
            "strategy": "channel" if grid.group_size == -1 else "group",
            "group_size": None if grid.group_size == -1 else grid.group_size,
            "dynamic": False,
        }
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": PACKED,
            "quantization_status": "compressed",
            "version": VERSION,
            "config_groups": {"group_0": group | {"format": PACKED}},
            # a name is compared with the whole of a layer's, and a model class's prefix is not known here
            "ignore": sorted(rf"re:(.*\.)?{re.escape(name)}$" for name in {"lm_head", *kept}),
            "kv_cache_scheme": None,
        }

    def _grid(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Affine:
        """Of the grids that config.json states, the one whose tensors these are."""
        stated = list(dict.fromkeys(self._stated()))
        fitting = [grid for grid in stated if self.refuse(grid, shape) is None and self._fits(grid, tensors, shape)]
        if len(fitting) == 1:
            return fitting[0]
        said = ", ".join(map(str, stated)) or "none"
        if fitting:
            raise FormatError(f"a weight {list(shape)} may be on several of config.json's grids: {said}")
        raise FormatError(f"a weight {list(shape)} with these tensors is on none of config.json's grids: {said}")

    def _fits(self, grid: Affine, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> bool:
        layout, signed = self.layout(grid, shape), _signed_zeros(tensors)
        if signed is None:
            of_kind = grid.symmetric == (".weight_zero_point" not in tensors)
        else:
            of_kind = not (grid.symmetric and signed.any())
            layout = layout | {".weight_zero_point": layout[".weight_scale"]}
        return of_kind and all(tuple(tensors[name].shape) == size for name, (_, size) in layout.items())

    def _stated(self) -> Iterator[Affine]:
        """The grids of config.json's groups of layers."""
        groups = self.said.get("config_groups")
        if not isinstance(groups, Mapping):
            raise FormatError("the quantization_config of compressed-tensors states config_groups")
        for name, group in groups.items():
            weights = group.get("weights") if isinstance(group, Mapping) else None
            if not isinstance(weights, Mapping):
                raise FormatError(f"config_groups {name!r} states no weights")
            _require(name, "format", group.get("format") or self.said.get("format"), PACKED)
            _require(name, "input_activations", group.get("input_activations"), None)
            _require(name, "type", weights.get("type", "int"), "int")
            strategy = weights.get("strategy") or ("channel" if weights.get("group_size") is None else "group")
            _require(name, "strategy", strategy, "group", "channel")
            size = -1 if strategy == "channel" else weights.get("group_size")
            try:
                yield Affine(weights.get("num_bits"), size, weights.get("symmetric", True))  # type: ignore[arg-type]
            except RequestError as error:
                raise FormatError(f"config_groups {name!r}: {error}") from error


def _signed_zeros(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """int8[O, G]: zeros as they were written before version 0.9.4, signed like the codes, and 0 on symmetric grids."""
    zeros = tensors.get(".weight_zero_point")
    return zeros if zeros is not None and zeros.dtype == torch.int8 and zeros.dim() == 2 else None


def _with_packed_zeros(tensors: Mapping[str, Tensor], grid: Affine) -> Mapping[str, Tensor]:
    """Zeros as they are written since version 0.9.4: packed, and none on symmetric grids."""
    signed = _signed_zeros(tensors)
    if signed is None:
        return tensors
    if grid.symmetric:
        return {name: tensor for name, tensor in tensors.items() if name != ".weight_zero_point"}
    zeros = signed.int() + grid.middle
    if zeros.numel() and not 0 <= int(zeros.min()) <= int(zeros.max()) <= grid.top:
        raise FormatError(
            f"weight_zero_point holds {int(signed.min())} to {int(signed.max())}; legal with {grid.bits} bits are "
            f"{-grid.middle} to {grid.top - grid.middle}"
        )
    return {**tensors, ".weight_zero_point": to_words(zeros.to(torch.uint8).T, grid.bits).T.contiguous()}


def _require(group: str, key: str, found: object, *legal: object) -> None:
    if found not in legal:
        raise FormatError(
            f"config_groups {group!r} says {key} {found!r}; neoquant reads {' and '.join(map(str, legal))}"
        )


def _unpack(words: Tensor, width: int, n: int) -> Tensor:
    """The first `n` codes of each row of int32[R, W]: uint8[R, n]."""
    return packing.unpack(to_bytes(words)[:, : packing.row_bytes(n, width)].contiguous(), width, n)
