"""Even steps: what GPTQ, AWQ and plain rounding of 2 to 8 bits put weights on.

    value = (code - zero) * scale          code = 0 ... 2**bits - 1

Groups of `group_size` inputs of one row share a scale (float16) and a zero: an integer among the codes, or a float16
number (as HQQ has it; Badri & Shaji 2023, https://mobiusml.github.io/hqq_blog/). A row that the group size does not
divide ends in a shorter group; a row shorter than a group is one group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from neoquant.errors import FormatError, RequestError
from neoquant.grids.base import TO_INTEGER, Columns, Grid, Params, ParamShapes, count_pieces, row_spans
from neoquant.grids.decoding import Decoding, Scale
from neoquant.native import rounding
from neoquant.native.gptq import Levels

BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 16, 32, 64, 128, 256)

# What the scale search tries, as parts of the range that the weights take: from, to, in how many steps. Few bits gain
# from clipping much; more steps than these gain nothing that could be measured.
SEARCHED = {2: (0.35, 1.0, 28), 3: (0.5, 1.0, 24), 4: (0.65, 1.0, 22), 8: (0.94, 1.0, 8)}


@dataclass(frozen=True)
class Affine(Grid):
    """`scale` float16[O, G] and, if not symmetric, `zero` uint8[O, G], float16[O, G] with `float_zero`; G groups a row.

    Symmetric: the zero is 2**(bits - 1), so there is one value fewer above it than below. -1 is a group a row.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    float_zero: bool = False

    legal_bits: ClassVar[tuple[int, ...]] = BITS
    options: ClassVar[tuple[str, ...]] = ("group_size", "symmetric", "float_zero")

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise RequestError(f"bits {self.bits!r}: affine has {', '.join(map(str, BITS))}")
        if type(self.group_size) is not int or self.group_size not in GROUP_SIZES:
            raise RequestError(
                f"group size {self.group_size!r}: legal are {', '.join(map(str, GROUP_SIZES))} (-1: a whole row)"
            )
        for name in ("symmetric", "float_zero"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is true or false, got {getattr(self, name)!r}")
        if self.symmetric and self.float_zero:
            raise RequestError(
                "a symmetric grid stores no zeros that float_zero could make float16: choose one of both"
            )

    @property
    def name(self) -> str:
        return "affine"

    @property
    def label(self) -> str:
        groups = "rows" if self.group_size == -1 else f"g{self.group_size}"
        return f"affine{self.bits}-{groups}{'-sym' if self.symmetric else '-float-zero' if self.float_zero else ''}"

    @property
    def top(self) -> int:
        """The highest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero of a symmetric grid."""
        return 1 << (self.bits - 1)

    @cached_property
    def decoding(self) -> Decoding:
        group = None if self.group_size == -1 else self.group_size
        zero = None if self.symmetric else "zero"
        return Decoding(self.bits, Scale("scale"), group, zero=zero, middle=self.middle)

    def width(self, columns: int) -> int:
        """Columns of a whole group in a row of so many."""
        return columns if self.group_size == -1 else min(self.group_size, columns)

    def param_shapes(self, shape: tuple[int, ...]) -> ParamShapes:
        size = (shape[0], count_pieces(shape[1], self.width(shape[1])))
        scale: ParamShapes = {"scale": (torch.float16, size)}
        kind = torch.float16 if self.float_zero else torch.uint8
        return scale if self.symmetric else {**scale, "zero": (kind, size)}

    def describe(self) -> dict[str, Any]:
        described = super().describe()
        if not self.float_zero:  # as it was described before there were float zeros
            del described["float_zero"]
        return described

    def remark(self, shape: tuple[int, ...]) -> str | None:
        if shape[1] <= self.group_size:
            return f"rows of {shape[1]} are one group, shorter than the group size {self.group_size}"
        rest = shape[1] % self.width(shape[1])
        return f"rows of {shape[1]} end in a group of {rest} instead of {self.group_size}" if rest else None

    def nearest(self, w: Tensor) -> tuple[Tensor, Params]:
        if rounding.refuse(w) is None:
            params, codes = self._empty(w), torch.empty(w.shape, dtype=torch.uint8)
            if self._fit_natively(w, params, codes):
                return codes, params
        params = self.fit(w)
        return self.round(w, params), params

    def fit(self, w: Tensor, search: bool = False, importance: Tensor | None = None) -> Params:
        params = self._empty(w)
        if not search and rounding.refuse(w) is None and self._fit_natively(w, params, None):
            return params

        def solve(groups: Tensor, rows: slice, columns: slice) -> Params:
            weights = None if importance is None else importance[columns].view(1, -1, groups.shape[-1]).float()
            return self.search_range(groups, weights) if search else self.cover_range(groups)

        return self.fit_groups(w, solve)

    def fit_groups(self, w: Tensor, solve: Callable[[Tensor, slice, slice], Params]) -> Params:
        """Parameters for w[O, I], solved a piece at a time.

        `solve` is given groups, float32[R, G, width], and which rows and columns of w these are; it returns their
        stored parameters {name: [R, G]}.
        """
        width, params = self.width(w.shape[1]), self._empty(w)
        for rows in row_spans(w):
            for columns, groups in self._split(w[rows].detach(), width):
                at = slice(columns.start // width, count_pieces(columns.stop, width))
                for name, fitted in solve(groups.float(), rows, columns).items():
                    params[name][rows, at] = fitted
        return params

    def round(self, w: Tensor, params: Params) -> Tensor:
        width = self.width(w.shape[1])
        if rounding.refuse(w) is None:
            held = {name: param.contiguous() for name, param in params.items()}
            return rounding.round_affine(w.detach(), width, self.bits, held["scale"], held.get("zero"))
        codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
        scale, zero = self.scale_and_zero(params)
        inverse, (whole, part) = reciprocal(scale), whole_and_part(zero)
        for rows in row_spans(w):
            for columns, groups in self._split(w[rows].detach(), width):
                at = slice(columns.start // width, count_pieces(columns.stop, width))
                steps = groups.float() * inverse[rows, at, None]
                steps = steps.add_(part[rows, at, None]).add_(TO_INTEGER).sub_(TO_INTEGER)
                steps = steps.add_(whole[rows, at, None]).clamp_(0, self.top)
                codes[rows, columns] = steps.to(torch.uint8).flatten(1)
        return codes

    def columns(self, params: Params, shape: tuple[int, int]) -> Columns:
        return _AffineColumns(self, params, shape)

    def with_scales(self, params: Params, scale: Tensor) -> Params | None:
        return {**params, "scale": scale.to(torch.float16)}

    def scale_and_zero(self, params: Params) -> tuple[Tensor, Tensor]:
        """Both as float32[O, G]."""
        scale = params["scale"].float()
        if self.symmetric:
            return scale, torch.full_like(scale, self.middle)
        return scale, params["zero"].float()

    def check(self, params: Params, shape: tuple[int, ...]) -> None:
        super().check(params, shape)
        if not self.symmetric and not self.float_zero and self.bits < 8 and int(params["zero"].max()) > self.top:
            raise FormatError(
                f"zeros of a weight of {self.bits} bits end at {self.top}, got {int(params['zero'].max())}"
            )

    def _fit_natively(self, w: Tensor, params: Params, codes: Tensor | None) -> bool:
        """Fill `params`, and `codes` if given; False where that cannot be, so that whoever goes on says why."""
        return rounding.fit_affine(
            w.detach(), self.width(w.shape[1]), self.bits, params["scale"], params.get("zero"), codes
        )

    def _empty(self, w: Tensor) -> Params:
        shapes = self.param_shapes(tuple(w.shape))
        return {name: torch.empty(size, dtype=dtype, device=w.device) for name, (dtype, size) in shapes.items()}

    def _split(self, w: Tensor, width: int) -> Iterator[tuple[slice, Tensor]]:
        """Whole groups [R, G, width] of w[R, I] and the short one [R, 1, rest], each with its columns."""
        body = w.shape[1] // width * width
        yield slice(0, body), w[:, :body].view(len(w), -1, width)
        if body < w.shape[1]:
            yield slice(body, w.shape[1]), w[:, body:].unsqueeze(1)

    def cover_range(self, groups: Tensor) -> Params:
        """The stored parameters {name: [R, G]} that cover the range of groups[R, G, width] and zero.

        Raises FormatError where the groups are not finite, or their scales no float16.
        """
        low, high = self._range(groups)
        params = self._params(low, high)
        if not params["scale"].isfinite().all():
            if not (low.isfinite().all() and high.isfinite().all()):
                raise FormatError("the weight holds infinity or NaN, which no grid can hold")
            raise FormatError(
                f"scales are float16, which ends at 65504; the largest is {(high - low).max() / self.top:g}"
            )
        return params

    def search_range(self, groups: Tensor, importance: Tensor | None = None) -> Params:
        """Those of least squared error, weighted by `importance`[1, G, width] where given, among parts of that range.

        Raises FormatError as `cover_range` does.
        """
        best = self.cover_range(groups)
        low, high = self._range(groups)
        error = self._error(groups, best, importance)
        start, end, steps = SEARCHED[self.bits]
        if self.symmetric:  # the range ends half a step beyond the highest value: a larger scale may be better
            end *= self.top / (self.top - 1)
        for part in torch.linspace(end, start, steps).tolist():
            tried = self._params(low * part, high * part)
            found = self._error(groups, tried, importance)
            better = found < error
            error = torch.where(better, found, error)
            best = {name: torch.where(better, tried[name], best[name]) for name in best}
        return best

    def group_steps(self, groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The codes nearest to groups[R, G, width] under scale and zero[R, G], less the zero: float32[R, G, width]."""
        steps = groups * reciprocal(scale)[..., None]
        if self.float_zero:
            _, part = whole_and_part(zero)
            steps.add_(part[..., None]).add_(TO_INTEGER).sub_(TO_INTEGER).sub_(part[..., None])
        else:
            steps.add_(TO_INTEGER).sub_(TO_INTEGER)
        torch.maximum(steps, -zero[..., None], out=steps)
        return torch.minimum(steps, self.top - zero[..., None], out=steps)

    def store(self, scale: Tensor, zero: Tensor) -> Params:
        """Scale and zero, float32[R, G], as they are stored; a zero that is stored in bytes is an integer already, a
        symmetric grid has none of its own."""
        stored = {"scale": scale.to(torch.float16)}
        return (
            stored if self.symmetric else {**stored, "zero": zero.to(torch.float16 if self.float_zero else torch.uint8)}
        )

    def _range(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Between what, [R, G], the values of groups[R, G, width] and zero lie; evenly about zero if symmetric."""
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        if self.symmetric:
            high = torch.maximum(high, -low)
            low = -high
        return low, high

    def _params(self, low: Tensor, high: Tensor) -> Params:
        """The stored parameters whose values run from `low` to `high`."""
        scale = ((high - low) / self.top).abs_().to(torch.float16).float()  # a group of zeros has not minus zero
        zero = low.abs() * reciprocal(scale)  # -low, which would make a zero of 0 minus 0
        if not self.float_zero:
            zero = zero.add_(TO_INTEGER).sub_(TO_INTEGER).clamp_(0, self.top)
        return self.store(scale, zero.nan_to_num_(0))

    def _error(self, groups: Tensor, params: Params, importance: Tensor | None) -> Tensor:
        """The squared error of every group, weighted by `importance`[1, G, width] where given: [R, G]."""
        scale, zero = self.scale_and_zero(params)
        values = self.group_steps(groups, scale, zero).mul_(scale[..., None]).sub_(groups).square_()
        return values.sum(2) if importance is None else values.mul_(importance).sum(2)


class _AffineColumns(Columns):
    def __init__(self, grid: Affine, params: Params, shape: tuple[int, int]) -> None:
        super().__init__(grid, params, shape)
        self.top, self.step = grid.top, grid.width(shape[1])
        self.width = self.step
        scale, zero = grid.scale_and_zero(params)
        self.scale, self.zero = scale.T.contiguous(), zero.T.contiguous()  # [G, O]: a column's lie together
        self.inverse = reciprocal(self.scale)
        self.whole, self.part = whole_and_part(self.zero)

    def round(self, j: int, w: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        held = (self.scale, self.inverse, self.zero, self.whole, self.part)
        of_group = [of_all[j // self.step] for of_all in held]
        scale, inverse, zero, whole, part = of_group if rows is None else [of_rows[rows] for of_rows in of_group]
        codes = (w * inverse).add_(part).round_().add_(whole).clamp_(0, self.top)
        return codes.to(torch.uint8), (codes - zero).mul_(scale)

    def levels(self) -> Levels:
        return Levels(self.scale, self.inverse, self.step, zero=self.zero, top=self.top)

    def _reload(self, group: int) -> None:
        assert isinstance(self.grid, Affine)
        self.scale[group] = self.params["scale"][:, group]
        if not self.grid.symmetric:
            self.zero[group] = self.params["zero"][:, group]
            self.whole[group], self.part[group] = whole_and_part(self.zero[group])
        self.inverse[group] = reciprocal(self.scale[group])


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where the scale is 0: every weight of such a group has the zero's code."""
    return torch.where(scale > 0, 1 / scale, 0.0)


def whole_and_part(zero: Tensor) -> tuple[Tensor, Tensor]:
    """A zero as a whole number and what is left of it, -0.5 to 0.5.

    The code of a weight w is round(w / scale + part) + whole: of an integer zero the part is 0, and weights are rounded
    as they are without it.
    """
    whole = zero.round()
    return whole, zero - whole
