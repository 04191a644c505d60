"""A trellis of two or three bits: trellis-coded quantization (Marcellin and Fischer, 1990; QTIP, arXiv:2406.11235,
section 3).

    two bits    state of row r = code[r] + 4 code[r - 1] + ... + 4**5 code[r - 5]
                value          = VALUES[2][(state * 1133 mod 4096) >> 8] * scale
    three bits  state of row r = code[r] + 8 code[r - 1] + ... + 8**3 code[r - 3]
                value          = VALUES[3][(state * 495 mod 4096) >> 7] * scale

Two bits choose among four values, but which four depends on the five codes before: so sixteen values are in use, and
what is searched is the path down a column; three bits choose among eight of thirty-two. Codes run down the rows, so
that GPTQ, which rounds column after column, feeds errors back as on any other grid. 256 rows are a ring (QTIP's
tail-biting): no state is stored, and no row is the worse for it.

QTIP's computed codes give each of 2**16 states a value of its own. Here the product says which of a few, as cheap to
decode as a codebook: the multipliers are the best of 150 and 250 tried, and the values are fitted to the normal
distribution by Lloyd's iteration, in steps of 1/32. Those of three bits are sixteen and their negatives, so that a
kernel looks sixteen up and the highest bit is the sign. Squared error on the normal distribution: 0.0718 and 0.0200
(Lloyd and Max's best four and eight values: 0.1175 and 0.0345).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from neoquant.errors import FormatError, RequestError
from neoquant.grids.affine import GROUP_SIZES
from neoquant.grids.base import Columns, Grid, Params, ParamShapes, count_pieces, require_finite
from neoquant.grids.decoding import Decoding, Scale, Trellis, tensor_of
from neoquant.grids.viterbi import best_codes
from neoquant.native import trellis as native

SPAN = 256
TRELLISES = {
    2: Trellis(code_bits=2, state_bits=12, level_bits=4, multiplier=1133, span=SPAN),
    3: Trellis(code_bits=3, state_bits=12, level_bits=5, multiplier=495, span=SPAN),
}
STEP = 1 / 32
_STEPS = {
    2: (-68, -45, -35, -27, -21, -13, -9, -2, 2, 9, 13, 21, 27, 35, 45, 68),
    3: (*(_POSITIVE := (1, 4, 6, 9, 12, 14, 17, 21, 24, 27, 31, 35, 41, 48, 60, 81)), *(-step for step in _POSITIVE)),
}
VALUES = {bits: tuple(STEP * step for step in steps) for bits, steps in _STEPS.items()}
SEARCHED = (0.9, 1.1, 1.25)  # parts of a group's root mean square that a scale search tries beside it
PRECISION = 512.0  # what a squared error of a typical scale costs
MOST, LEAST = 16.0, 1 / 16  # how much more and less errors of rows with other scales than the typical one cost
PIECE = 1 << 23  # weights rounded at once


@dataclass(frozen=True)
class TrellisGrid(Grid):
    """`scale` float16[O, G] of groups of `group_size` inputs of a row, -1 a whole row: the group's root mean square."""

    group_size: int = 64
    bits: int = 2

    legal_bits: ClassVar[tuple[int, ...]] = tuple(TRELLISES)
    options: ClassVar[tuple[str, ...]] = ("group_size",)

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in TRELLISES:
            raise RequestError(f"bits {self.bits!r}: trellis has {', '.join(map(str, TRELLISES))}")
        if not isinstance(self.group_size, int) or self.group_size not in GROUP_SIZES:
            raise RequestError(
                f"group size {self.group_size!r}: legal for trellis are {', '.join(map(str, GROUP_SIZES))} "
                "(-1: a whole row)"
            )

    @property
    def name(self) -> str:
        return "trellis"

    @property
    def label(self) -> str:
        return f"trellis{self.bits}-{'rows' if self.group_size == -1 else f'g{self.group_size}'}"

    @property
    def trellis(self) -> Trellis:
        return TRELLISES[self.bits]

    @cached_property
    def decoding(self) -> Decoding:
        group = None if self.group_size == -1 else self.group_size
        return Decoding(self.bits, Scale("scale"), group, table=VALUES[self.bits], step=STEP, trellis=self.trellis)

    def param_shapes(self, shape: tuple[int, ...]) -> ParamShapes:
        return {"scale": (torch.float16, (shape[0], count_pieces(shape[1], self.decoding.width(shape[1]))))}

    def describe(self) -> dict[str, Any]:
        described = super().describe()
        if self.bits == 2:  # as it was described before there were others
            del described["bits"]
        return described

    def remark(self, shape: tuple[int, ...]) -> str | None:
        rest = shape[1] % self.decoding.width(shape[1])
        return f"rows of {shape[1]} end in a group of {rest} instead of {self.group_size}" if rest else None

    def nearest(self, w: Tensor) -> tuple[Tensor, Params]:
        params = self.fit(w)
        return self.round(w, params), params

    def fit(self, w: Tensor, search: bool = False, importance: Tensor | None = None) -> Params:
        """As `Grid.fit`; without `search`, each group's root mean square, for which the values are made."""
        found = {"scale": self._stored(self._mean_squares(w.detach(), None).sqrt_())}
        if search and w.numel():
            found = self._search(w.detach(), found, importance)
        return found

    def round(self, w: Tensor, params: Params) -> Tensor:
        """As `Grid.round`: the codes of the path down each column that has the least squared error."""
        home, w = w.device, w.detach()
        if native.refuse() is None:  # also for a GPU, which takes several launches for each row
            w, params = w.cpu(), {name: param.cpu() for name, param in params.items()}
        codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
        rows = max(SPAN, PIECE // w.shape[1] // SPAN * SPAN)
        for piece, scale, to in zip(
            torch.split(w, rows), torch.split(params["scale"], rows), torch.split(codes, rows), strict=True
        ):
            to.copy_(self._columns(scale, piece.shape).round_all(piece.T.float().contiguous()).T)
        return codes.to(home)

    def columns(self, params: Params, shape: tuple[int, int]) -> Columns:
        return self._columns(params["scale"], shape)

    def with_scales(self, params: Params, scale: Tensor) -> Params | None:
        return {"scale": scale.to(torch.float16)}

    def _columns(self, scale: Tensor, shape: torch.Size | tuple[int, int]) -> _TrellisColumns:
        return _TrellisColumns(self, {"scale": scale}, (shape[0], shape[1]))

    def _mean_squares(self, w: Tensor, weights: Tensor | None) -> Tensor:
        """Of every group of w[O, I], each input weighted by weights[I] where given: float32[O, G]."""
        width = self.decoding.width(w.shape[1])
        squares = w.float().square()
        if weights is not None:
            squares *= weights
        means = [group.mean(1) for group in torch.split(squares, width, 1)]
        found = torch.stack(means, 1)
        require_finite(w.abs().amax())
        return found

    def _stored(self, scale: Tensor) -> Tensor:
        stored = scale.to(torch.float16)
        if not stored.isfinite().all():
            raise FormatError(f"scales are float16, which ends at 65504; the largest is {scale.max():g}")
        most = torch.finfo(torch.float16).max / max(VALUES[self.bits])  # with which every value is finite, too
        return stored.clamp_(max=most)

    def _search(self, w: Tensor, found: Params, importance: Tensor | None) -> Params:
        """Of some parts of the scales in `found`, those of the smallest squared error, each input weighted by
        importance[I] where given."""
        weights = None if importance is None else importance.to(w.device).float()
        best, least = found["scale"], self._error(w, found, weights)
        for part in SEARCHED:
            tried = {"scale": self._stored(found["scale"].float() * part)}
            error = self._error(w, tried, weights)
            best = torch.where(error < least, tried["scale"], best)
            least = torch.minimum(error, least)
        return {"scale": best}

    def _error(self, w: Tensor, params: Params, weights: Tensor | None) -> Tensor:
        values = self.decode(self.round(w, params), params)
        return self._mean_squares(values.sub_(w), weights)


class _TrellisColumns(Columns):
    """Every row of a column hangs together with those above it: only whole columns are rounded."""

    def __init__(self, grid: TrellisGrid, params: Params, shape: tuple[int, int]) -> None:
        super().__init__(grid, params, shape)
        self.trellis, self.values = grid.trellis, VALUES[grid.bits]
        self.width = self.group = grid.decoding.width(shape[1])
        self.scale = self.params["scale"].float().T.contiguous()  # [G, O]: a column's lie together
        self.rows: Tensor | None = None  # [O], what their errors count against each other
        self.importance = self._importance(self.scale)

    def weigh_rows(self, weights: Tensor) -> None:
        self.rows = weights.float()
        self.importance = self._importance(self.scale)

    def round(self, j: int, w: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert rows is None, "a trellis runs through all rows"
        scale, importance = self.scale[j // self.group], self.importance[j // self.group]
        wanted = torch.where(scale > 0, w.float() / scale, 0.0)
        pairs = zip(torch.split(wanted, SPAN), torch.split(importance, SPAN), strict=True)
        codes = torch.cat([best_codes(one[None], cost[None], self.trellis, self.values)[0] for one, cost in pairs])
        places = self.trellis.numbers(codes[:, None])[:, 0]
        return codes, (tensor_of(self.values, w.device)[places.long()] * scale).to(w.dtype)

    def round_all(self, weights: Tensor) -> Tensor:
        """Every column on its own: weights float32[I, O], contiguous, to codes uint8[I, O]."""
        codes = torch.empty(weights.shape, dtype=torch.uint8, device=weights.device)
        if weights.device.type == "cpu" and native.refuse() is None:
            native.round_columns(weights, None, self.levels(), torch.arange(len(weights)), codes)
            return codes
        group = torch.arange(len(weights), device=weights.device) // self.group
        for start in range(0, weights.shape[1], SPAN):
            at = slice(start, start + SPAN)
            scale = self.scale[group, at]
            wanted = torch.where(scale > 0, weights[:, at] / scale, 0.0)
            codes[:, at] = best_codes(wanted, self.importance[group, at], self.trellis, self.values)
        return codes

    def levels(self) -> native.Paths:
        cpu = torch.device("cpu")
        chain, values = self.trellis, tensor_of(self.values, cpu)
        return native.Paths(self.scale, self.importance, self.group, chain.code_bits, chain.levels(cpu), values)

    def _reload(self, group: int) -> None:
        self.scale[group] = self.params["scale"][:, group]
        self.importance[group] = self._importance(self.scale[group, None])[0]

    def _importance(self, scale: Tensor) -> Tensor:
        """What a squared error of a scale costs where it is scale[G, O]: as its square, times what errors of its row
        count, beside the span's mean."""
        squares = scale.square() if self.rows is None else scale.square() * self.rows
        means = [span.mean(1, keepdim=True).expand_as(span) for span in torch.split(squares, SPAN, 1)]
        relative = squares / torch.cat(means, 1).clamp(min=torch.finfo(torch.float32).tiny)
        return relative.clamp_(LEAST, MOST).mul_(PRECISION).contiguous()
