"""The rows of a plan: one for each tensor of the source."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from neoquant.checkpoint import TensorHeader
from neoquant.formats import Format
from neoquant.formats.base import dtype_name
from neoquant.grids import Grid
from neoquant.model.names import (
    EMBEDDING,
    HEADS,
    TASK_HEADS,
    canonical_layer,
    canonical_tensor,
    in_block,
    is_block_linear,
)
from neoquant.quantization.recipe import Rule
from neoquant.quantizers import Nearest, Quantizer

UNKNOWN = "unknown"
"""Why a tensor is kept that is no part of a GPT-Neo."""

# What packing takes beside a weight that is being quantized: its codes, and two more of their size.
_WORK_BYTES_PER_WEIGHT = 3

Action = Literal["quantize", "keep", "copy", "drop"]


@dataclass(frozen=True)
class Target:
    """Where a weight goes and who takes it there."""

    grid: Grid
    quantizer: Quantizer


@dataclass(frozen=True)
class PlanRow:
    """One tensor of the source.

    `action`: `quantize`; `keep`, a weight matrix in half precision; `copy`, a small tensor (bias, norm) in half
    precision; `drop`, not written. `stored` holds what the output has in its place, `reason` why in a few words.
    """

    source: TensorHeader
    layer: str
    action: Action
    stored: tuple[TensorHeader, ...]
    reason: str
    target: Target | None = None
    """Of what is quantized."""

    @property
    def grid(self) -> Grid | None:
        return None if self.target is None else self.target.grid

    @property
    def quantizer(self) -> Quantizer | None:
        return None if self.target is None else self.target.quantizer

    @property
    def needs_calibration(self) -> bool:
        return self.target is not None and self.target.quantizer.needs_calibration

    @property
    def block(self) -> int | None:
        """The number of the block that the tensor belongs to."""
        place = in_block(self.name)
        return None if place is None else place[0]

    @property
    def name_in_block(self) -> str:
        """`attn.attention.q_proj.weight`, of a tensor that belongs to a block."""
        place = in_block(self.name)
        assert place is not None
        return place[1]

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def rounded_from(self) -> torch.dtype:
        """What a weight is quantized from: its own type, or float32, since no grid or format knows float64."""
        return quantizable_type(self.dtype)

    @property
    def is_linear(self) -> bool:
        """Whether this is the weight of a block linear, quantized or not."""
        return is_linear_weight(self.source)

    @property
    def out_bytes(self) -> int:
        return sum(header.nbytes for header in self.stored)

    @property
    def work_bytes(self) -> int:
        """What is alive at once while it is carried out: the source's tensor, and what is made of it."""
        if self.action == "quantize":
            narrowed = 0 if self.rounded_from == self.dtype else self.rounded_from.itemsize * self.source.numel
            return self.source.nbytes + narrowed + _WORK_BYTES_PER_WEIGHT * self.source.numel
        if self.action == "drop":
            return self.source.nbytes
        return self.source.nbytes + (0 if self.stored[0].dtype == self.dtype else self.out_bytes)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        entry: dict[str, Any] = {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": dtype_name(self.dtype),
            "action": self.action,
            "bytes": self.out_bytes,
            "reason": self.reason,
        }
        if self.target is not None:
            entry |= {"grid": self.target.grid.describe(), "quantizer": self.target.quantizer.describe()}
        return entry


def quantizable_type(dtype: torch.dtype) -> torch.dtype:
    """The type that a weight stored as `dtype` has when it is quantized."""
    return torch.float32 if dtype == torch.float64 else dtype


def is_linear_weight(header: TensorHeader) -> bool:
    """Whether a tensor is the weight matrix of a block linear."""
    is_weight = header.name.endswith(".weight") and len(header.shape) == 2
    return is_weight and is_block_linear(canonical_layer(header.name))


def matrix_shape(header: TensorHeader) -> tuple[int, int]:
    """(O, I) of a weight matrix."""
    rows, columns = header.shape
    return rows, columns


@dataclass(frozen=True)
class RowMaker:
    """Makes the row of each tensor, once it is decided what is quantized, and how.

    rules   linear layer -> the rule that decides about it, None where there is none
    grids   layer or table to quantize -> its grid
    format  of what is quantized; dtype of what is not
    known   the names of the tensors of a language model
    """

    rules: Mapping[str, Rule | None]
    grids: Mapping[str, Grid]
    format: Format
    dtype: torch.dtype
    known: Container[str]

    def row(self, header: TensorHeader) -> PlanRow:
        """The row of any tensor but a tied head."""
        layer = canonical_layer(header.name)
        grid = self.grids.get(layer) if header.name.endswith(".weight") else None
        if grid is not None:
            return self._quantized(header, layer, grid, self.rules.get(layer))
        kept = header._replace(dtype=self.dtype if header.dtype.is_floating_point else header.dtype)
        action: Action = "keep" if len(header.shape) > 1 else "copy"
        return PlanRow(header, layer, action, (kept,), self._why_kept(header, layer))

    def tied_head(self, header: TensorHeader) -> PlanRow:
        """The row of a head that is the embedding, which is stored as well."""
        return PlanRow(header, "lm_head", "drop", (), f"tied to {EMBEDDING}")

    def _quantized(self, header: TensorHeader, layer: str, grid: Grid, rule: Rule | None) -> PlanRow:
        """A block linear by its `rule`, or an embedding without one."""
        prefix = header.name.removesuffix(".weight")
        quantizer = Nearest() if rule is None else rule.make_quantizer()
        layout = self.format.layout(grid, matrix_shape(header), quantizable_type(header.dtype), quantizer.stores_order)
        stored = tuple(TensorHeader(prefix + suffix, *spec) for suffix, spec in layout.items())
        why = "embedding" if rule is None else f"match = {rule.match!r}"
        return PlanRow(header, layer, "quantize", stored, why, Target(grid, quantizer))

    def _why_kept(self, header: TensorHeader, layer: str) -> str:
        if is_linear_weight(header):
            rule = self.rules[layer]
            return f"match = {rule.match!r}" if rule is not None else "no rule matches it"
        if canonical_tensor(header.name) not in self.known and layer not in TASK_HEADS.values():
            return UNKNOWN
        return "small" if len(header.shape) < 2 else "head" if layer in HEADS else "embedding"
