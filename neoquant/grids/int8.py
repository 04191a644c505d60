"""int8 rows, as bitsandbytes stores LLM.int8() weights (arXiv:2208.07339)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from neoquant.errors import FormatError
from neoquant.grids.base import TO_INTEGER, Columns, Grid, Params, ParamShapes, require_finite, row_spans
from neoquant.grids.decoding import Decoding, Scale
from neoquant.native import rounding
from neoquant.native.gptq import Levels

DECODING = Decoding(bits=8, scale=Scale("scb", factor=1.0 / 127.0), signed=True)


@dataclass(frozen=True)
class Int8Rows(Grid):
    """int8 times a row's absmax / 127, as bitsandbytes stores LLM.int8() weights.

    `codes` hold the int8 bits viewed as uint8 (-1 is 255); `scb` float32[O] is the absmax of each row. The weight
    is rounded to float16 first, because bitsandbytes does.
    """

    bits: ClassVar[int] = 8
    legal_bits: ClassVar[tuple[int, ...]] = (8,)
    options: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        return "int8"

    @property
    def decoding(self) -> Decoding:
        return DECODING

    def param_shapes(self, shape: tuple[int, ...]) -> ParamShapes:
        return {"scb": (torch.float32, (shape[0],))}

    def nearest(self, w: Tensor) -> tuple[Tensor, Params]:
        if rounding.refuse(w) is None:
            codes, scb = rounding.round_rows(w.detach())
            _require_half(w, scb)
            return codes.view(torch.uint8), {"scb": scb}
        params = self.fit(w)
        return self.round(w, params), params

    def fit(self, w: Tensor, search: bool = False, importance: Tensor | None = None) -> Params:
        scb = torch.empty(w.shape[0], dtype=torch.float32, device=w.device)
        for rows in row_spans(w):
            scb[rows] = w[rows].detach().abs().amax(1).to(torch.float16)
        _require_half(w, scb)
        return {"scb": scb}

    def round(self, w: Tensor, params: Params) -> Tensor:
        codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
        for rows in row_spans(w):
            steps = w[rows].detach().to(torch.float16) * (127.0 / params["scb"][rows, None])
            steps.nan_to_num_(0).clamp_(-127, 127)  # an all-zero row gives 0 * inf
            codes[rows] = steps.add_(TO_INTEGER).sub_(TO_INTEGER)
        return codes.view(torch.uint8)

    def with_scales(self, params: Params, scale: Tensor) -> Params | None:
        return {"scb": scale * 127.0}

    def columns(self, params: Params, shape: tuple[int, int]) -> Columns:
        return _Int8Columns(self, params, shape)


class _Int8Columns(Columns):
    def __init__(self, grid: Int8Rows, params: Params, shape: tuple[int, int]) -> None:
        super().__init__(grid, params, shape)
        self.step = params["scb"] * (1.0 / 127.0)
        self.inverse = 127.0 / params["scb"]

    def round(self, j: int, w: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        step, inverse = (self.step, self.inverse) if rows is None else (self.step[rows], self.inverse[rows])
        codes = w.to(torch.float16) * inverse
        codes = codes.nan_to_num_(0).clamp_(-127, 127).round_()
        return codes.to(torch.int8).view(torch.uint8), (codes * step).to(w.dtype)

    def levels(self) -> Levels:
        return Levels(self.step[None], self.inverse[None], self.shape[1], top=127)


def _require_half(w: Tensor, scb: Tensor) -> None:
    if not scb.isfinite().all() and w.isfinite().all():
        largest = w.abs().max().item()
        raise FormatError(f"int8 goes through float16, which ends at 65504; the largest weight is {largest:g}")
    require_finite(scb)
