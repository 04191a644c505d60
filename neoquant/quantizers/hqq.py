"""Half-quadratic quantization (Badri & Shaji 2023, https://mobiusml.github.io/hqq_blog/): scales and zeros without
calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from neoquant.errors import RequestError
from neoquant.grids import Affine, Grid, Params
from neoquant.grids.affine import reciprocal
from neoquant.quantizers.base import Quantizer
from neoquant.quantizers.hessian import Hessian
from neoquant.tensor import QuantizedTensor

BETA, GROWTH = 10.0, 1.01  # weight of the quadratic penalty, errors in steps, and its growth with each iteration
SMALLEST_SPREAD = 1e-6  # of a group's sum of squares: below it, in float32, its weights are one
SMALLEST_ERROR = 1e-8  # in steps: the threshold of an error of 0 is infinite
ZEROS = (-1, 0, 1)  # integer zeros that are tried, from that of round-to-nearest
PARTS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of the scale that clips nothing, where the solver starts with few bits;
FLOAT_ZERO_ITERATIONS = 3
MOST_BITS_CLIPPED = 3  # with more, steps are so fine that clipping at the start only loses, on both models measured


@dataclass(frozen=True)
class Hqq(Quantizer):
    """Affine groups whose errors e = w - (code - zero) * scale are solved for with an l_p norm, p < 1, to which errors
    of outliers count for little.

    Half-quadratic splitting gives the error a variable of its own and alternates: that variable by the generalized
    shrinkage of the present error, then the parameters from the weights less it. The source solves for a float zero at
    a fixed scale. With float zeros (`Affine.float_zero`) both are solved for here, by least squares, from those of
    round-to-nearest. Where zeros are integers, the scale alone is, from several starts for each zero near that of
    round-to-nearest; a symmetric grid has one zero.

    Of all parameters on the way, as they are stored, each group keeps those of the least sum of |e|**3; those of
    round-to-nearest are among them. Choosing by the l_p norm itself, or by squares, shrinks scales until large weights
    are clipped, which on trained models can lose more than rounding does.

    What has least error is too small: whatever brings codes closest to weights gives their mean given the code, so that
    <w, w - e> is less than <w, w>, by 2 % at 3 bits. All weights of a layer shrink alike, and so do its outputs, while
    what is left of the errors points anywhere. So with float zeros codes are chosen as above, and scale and zero are
    stored with which <w, w - e> = <w, w>, about the group's mean, and that of e is 0. On neo-8m layers' outputs are
    then off by an eighth less, on the bundled model by as much as before. With integer zeros, means of errors remain,
    and the bundled model's layers lose by it.

    norm        p of the solver.
    iterations  of the solver, shared among its starts: six scales with up to 3 bits, the unclipped one with more; for
                float zeros, which have one start, FLOAT_ZERO_ITERATIONS times as many.
    unit_gain   whether groups with float zeros keep their size; without it they have least error, as others do.
    """

    norm: float = 0.7
    iterations: int = 6
    unit_gain: bool = True

    name: ClassVar[str] = "hqq"

    def __post_init__(self) -> None:
        if not 0 < self.norm <= 1:
            raise RequestError(f"norm {self.norm}: legal is more than 0, at most 1")
        if self.iterations < 1:
            raise RequestError(f"iterations {self.iterations}: legal is 1 or more")
        if not isinstance(self.unit_gain, bool):
            raise RequestError(f"unit_gain is true or false, got {self.unit_gain!r}")

    def refuse(self, grid: Grid) -> str | None:
        return None if isinstance(grid, Affine) else f"hqq solves for the scales of affine groups, {grid.name} has none"

    def _quantize(
        self, w: Tensor, grid: Grid, hessian: Hessian | None, output_hessian: Tensor | None, missing: Tensor | None
    ) -> tuple[QuantizedTensor, None]:
        assert isinstance(grid, Affine)
        codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)

        def solve(groups: Tensor, rows: slice, columns: slice) -> Params:
            best = self._solve(grid, groups)
            steps = grid.group_steps(groups, best.scale, best.zero)
            codes[rows, columns] = (steps + best.zero[..., None]).round_().to(torch.uint8).flatten(1)
            if not (self.unit_gain and grid.float_zero):
                return grid.store(best.scale, best.zero)
            return grid.store(*_unit_gain(groups, steps, best.scale, best.zero))

        params = grid.fit_groups(w, solve)
        return QuantizedTensor(codes, grid, params, dtype=w.dtype), None

    def _solve(self, grid: Affine, groups: Tensor) -> _Best:
        """The scales and zeros by which groups[R, G, width] are rounded."""
        unit, middle = grid.scale_and_zero(grid.cover_range(groups))
        best = _Best(groups, grid, unit, middle)
        if grid.float_zero:
            self._solve_both(best)
            return best
        starts = PARTS if grid.bits <= MOST_BITS_CLIPPED else PARTS[:1]
        for shift in (0,) if grid.symmetric else ZEROS:
            zero = (middle + shift).clamp(0, grid.top)
            unclipped = _unclipped_scale(groups, zero, grid.top)
            for part in starts:
                scale = (part * unclipped).to(torch.float16).float()
                for iteration in range(max(1, self.iterations // len(starts))):
                    steps, error = best.consider(scale, zero)
                    target = groups - self._shrink(error, unit[..., None], BETA * GROWTH**iteration)
                    scale = _least_squares(target, steps, scale).to(torch.float16).float()
                best.consider(scale, zero)
        return best

    def _solve_both(self, best: _Best) -> None:
        """Scale and zero together, from those of round-to-nearest."""
        groups, unit = best.groups, best.scale
        scale, zero = unit, best.zero
        for iteration in range(FLOAT_ZERO_ITERATIONS * self.iterations):
            steps, error = best.consider(scale, zero)
            target = groups - self._shrink(error, unit[..., None], BETA * GROWTH**iteration)
            scale, zero = _least_squares_line(target, steps, scale, zero)
        best.consider(scale, zero)

    def _shrink(self, error: Tensor, unit: Tensor, beta: float) -> Tensor:
        """The generalized soft threshold of error[R, G, width], in steps of `unit`: |error|**(p - 1) / beta is taken
        from each, at most all of it."""
        size = (error.abs() * reciprocal(unit)).clamp_(min=SMALLEST_ERROR)
        shrunk = (size - size.pow(self.norm - 1) / beta).clamp_(min=0)
        return shrunk.mul_(error.sign()).mul_(unit)


class _Best:
    """The best scale and zero of each group so far, [R, G]."""

    def __init__(self, groups: Tensor, grid: Affine, scale: Tensor, zero: Tensor) -> None:
        self.groups, self.grid = groups, grid
        self.scale, self.zero, self.least = scale, zero, torch.full_like(scale, torch.inf)
        self.consider(scale, zero)

    def consider(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Keep these where they are better; the codes less the zero, and the errors, both [R, G, width]."""
        steps = self.grid.group_steps(self.groups, scale, zero)
        error = self.groups - steps * scale[..., None]
        cubes = (error.square() * error.abs()).sum(2)
        better = cubes < self.least
        self.least = torch.where(better, cubes, self.least)
        self.scale, self.zero = torch.where(better, scale, self.scale), torch.where(better, zero, self.zero)
        return steps, error


def _unclipped_scale(groups: Tensor, zero: Tensor, top: int) -> Tensor:
    """The least scale[R, G] that clips nothing on the sides of the zero where there are codes."""
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    below = torch.where(zero > 0, -low / zero.clamp(min=1), 0.0)
    above = torch.where(zero < top, high / (top - zero).clamp(min=1), 0.0)
    return torch.maximum(below, above)


def _least_squares(target: Tensor, steps: Tensor, scale: Tensor) -> Tensor:
    """The scale[R, G] that brings steps[R, G, width] closest to `target`; the present one where every step is 0."""
    length = steps.square().sum(2)
    return torch.where(length > 0, (target * steps).sum(2) / length.clamp(min=1), scale).abs()


def _least_squares_line(target: Tensor, steps: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero [R, G], as they are stored, that bring (steps + present zero - zero) * scale closest to `target`,
    of which steps[R, G, width] are codes less the present zero; where all codes are one, the scale stays."""
    middle, mean = steps.mean(2), target.mean(2)
    apart = steps - middle[..., None]
    spread, common = apart.square().sum(2), (apart * target).sum(2)
    found = torch.where((spread > 0) & (common > 0), common / spread.clamp(min=SMALLEST_ERROR), scale)
    found = found.to(torch.float16).float()
    return found, (zero + middle - mean * reciprocal(found)).to(torch.float16).float()


def _unit_gain(groups: Tensor, steps: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and float zero [R, G], as they are stored, with which steps[R, G, width], codes less the present zero,
    stand for values with the mean of groups[R, G, width], and about it as large along them: <w, value> = <w, w>. Where
    a group has one code, or its weights are one, both stay."""
    middle, mean = steps.mean(2), groups.mean(2)
    apart = groups - mean[..., None]
    along = (apart * (steps - middle[..., None])).sum(2) * scale
    found = (scale * apart.square().sum(2) / along).to(torch.float16).float()
    moved = (zero + middle - mean * reciprocal(found)).to(torch.float16).float()
    usable = (along > SMALLEST_SPREAD * groups.square().sum(2)) & found.isfinite() & moved.isfinite()
    return torch.where(usable, found, scale), torch.where(usable, moved, zero)
