"""MXFP4: four-bit floating point, 32 numbers of a row times a power of two (OCP Microscaling Formats 1.0, 2023).

    value = e2m1(code) * 2**(scale - 127)

e2m1 (section 5.3.3) is a sign, two bits of exponent with a bias of 1, and one of mantissa. Scales are e8m0 (section
5.4.1): an exponent in a byte, 0 to 254; 255 is NaN, which no weight here has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from neoquant.errors import FormatError
from neoquant.grids.base import TO_INTEGER, Columns, Grid, Params, ParamShapes, count_pieces, require_finite, row_spans
from neoquant.grids.decoding import Decoding, Scale, tensor_of
from neoquant.native.gptq import Levels

BLOCK = 32
LARGEST_EXPONENT = 2  # of e2m1: its largest value is 1.5 * 2**2
HIGHEST_SCALE = 125 + 127  # under a larger one, the largest value would be beyond float32
SEARCHED = (1, -1)  # steps from the scale of the specification's rule

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))
E8M0 = (*(2.0 ** (byte - 127) for byte in range(255)), math.nan)
_INVERSE = (*(2.0 ** (127 - byte) for byte in range(255)), math.nan)
_DECODING = Decoding(bits=4, scale=Scale("scale", table=E8M0), group=BLOCK, table=E2M1, step=0.5, zero_code=0)


@dataclass(frozen=True)
class Mxfp4(Grid):
    """`scale` uint8[O, G], G = ceil(I / 32): e8m0. `codes` are e2m1's bits, the sign highest.

    A row that 32 does not divide ends in a shorter block. The scale of a block of zeros is 2**-127.
    """

    bits: ClassVar[int] = 4
    legal_bits: ClassVar[tuple[int, ...]] = (4,)
    options: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        return "mxfp4"

    @property
    def decoding(self) -> Decoding:
        return _DECODING

    def param_shapes(self, shape: tuple[int, ...]) -> ParamShapes:
        return {"scale": (torch.uint8, (shape[0], count_pieces(shape[1], BLOCK)))}

    def remark(self, shape: tuple[int, ...]) -> str | None:
        rest = shape[1] % BLOCK
        return f"rows of {shape[1]} end in a block of {rest} instead of {BLOCK}" if rest else None

    def nearest(self, w: Tensor) -> tuple[Tensor, Params]:
        params = self.fit(w)
        return self.round(w, params), params

    def fit(self, w: Tensor, search: bool = False, importance: Tensor | None = None) -> Params:
        """As `Grid.fit`; without `search` by section 6.3: the exponent of the block's absmax less that of e2m1's."""
        scale = torch.empty(self.param_shapes(tuple(w.shape))["scale"][1], dtype=torch.uint8, device=w.device)
        weights = None if importance is None else _blocks(importance[None].to(w.device))
        for rows in row_spans(w):
            blocks = _blocks(w[rows].detach())
            absmax = blocks.abs().amax(2)
            require_finite(absmax)
            found = (absmax.frexp().exponent - 1 - LARGEST_EXPONENT + 127).clamp_(0, HIGHEST_SCALE)
            found = torch.where(absmax > 0, found, 0)
            scale[rows] = (_search(blocks, found, weights) if search else found).to(torch.uint8)
        return {"scale": scale}

    def round(self, w: Tensor, params: Params) -> Tensor:
        codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
        for rows in row_spans(w):
            blocks = _blocks(w[rows].detach())
            scaled = blocks * _look_up(_INVERSE, params["scale"][rows])[..., None]
            codes[rows] = nearest_codes(scaled).flatten(1)[:, : w.shape[1]]
        return codes

    def columns(self, params: Params, shape: tuple[int, int]) -> Columns:
        return _Mxfp4Columns(self, params, shape)

    def check(self, params: Params, shape: tuple[int, ...]) -> None:
        super().check(params, shape)
        if int(params["scale"].max()) == 255:
            raise FormatError("scale of a mxfp4 weight holds 255, which is NaN; legal are 0 to 254")


class _Mxfp4Columns(Columns):
    width = BLOCK

    def __init__(self, grid: Mxfp4, params: Params, shape: tuple[int, int]) -> None:
        super().__init__(grid, params, shape)
        stored = params["scale"].T.contiguous()  # [G, O]: a column's lie together
        self.scale, self.inverse = _look_up(E8M0, stored), _look_up(_INVERSE, stored)

    def round(self, j: int, w: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        of_group = self.scale[j // BLOCK], self.inverse[j // BLOCK]
        scale, inverse = of_group if rows is None else (of_group[0][rows], of_group[1][rows])
        codes = nearest_codes(w.float() * inverse)
        return codes, (_look_up(E2M1, codes) * scale).to(w.dtype)

    def levels(self) -> Levels:
        bounds, order = _intervals(self.scale.device)
        table = tensor_of(E2M1, self.scale.device)
        return Levels(self.scale, self.inverse, BLOCK, bounds=bounds, order=order, table=table)

    def _reload(self, group: int) -> None:
        stored = self.params["scale"][:, group]
        self.scale[group], self.inverse[group] = _look_up(E8M0, stored), _look_up(_INVERSE, stored)


def nearest_codes(scaled: Tensor) -> Tensor:
    """The codes, uint8, of the values nearest to float32 `scaled`: ties to even, what is too large to +-6.

    Codes of magnitudes rise by one a step, and steps are 0.5 up to 2, 1 up to 4, 2 up to 6: of the three ways to count,
    the right one gives the smallest number.
    """
    size = scaled.abs().clamp_(max=6)
    codes = (size * 2).add_(TO_INTEGER).sub_(TO_INTEGER)
    torch.minimum(codes, (size + TO_INTEGER).sub_(TO_INTEGER - 2), out=codes)
    torch.minimum(codes, (size * 0.5).add_(TO_INTEGER).sub_(TO_INTEGER - 4), out=codes)
    return codes.to(torch.uint8) + (scaled < 0).to(torch.uint8).mul_(8)


@cache
def _intervals(device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the values above one begin, float32[15], and the codes of the intervals between, uint8[16].

    A number belongs above a bound that it is larger than: where a tie goes up, the bound is the next smaller number.
    """
    order = torch.tensor([*range(15, 7, -1), *range(8)], dtype=torch.uint8)
    values = tensor_of(E2M1, torch.device("cpu"))[order.long()]
    middles = (values[:-1] + values[1:]) / 2
    goes_up = order[1:] % 2 == 0  # even codes have an even mantissa
    bounds = torch.where(goes_up, middles.nextafter(torch.tensor(-math.inf)), middles)
    return bounds.to(device), order.to(device)


def _blocks(w: Tensor) -> Tensor:
    """w[R, I] as float32[R, G, 32], a short block filled up with zeros."""
    return torch.nn.functional.pad(w.float(), (0, -w.shape[1] % BLOCK)).view(len(w), -1, BLOCK)


def _look_up(table: tuple[float, ...], codes: Tensor) -> Tensor:
    return tensor_of(table, codes.device).index_select(0, codes.reshape(-1).int()).view(codes.shape)


def _search(blocks: Tensor, scale: Tensor, weights: Tensor | None) -> Tensor:
    """Of scales int[R, G] and those beside them, those of the smallest squared error of blocks[R, G, 32]."""

    def error(tried: Tensor) -> Tensor:
        codes = nearest_codes(blocks * _look_up(_INVERSE, tried)[..., None])
        apart = (_look_up(E2M1, codes) * _look_up(E8M0, tried)[..., None]).sub_(blocks).square_()
        return (apart if weights is None else apart.mul_(weights)).sum(2)

    best, least = scale, error(scale)
    for step in SEARCHED:
        tried = (scale + step).clamp(0, HIGHEST_SCALE)
        found = error(tried)
        best, least = torch.where(found < least, tried, best), torch.minimum(found, least)
    return best
