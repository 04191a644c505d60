"""HQQ: its own objective against round-to-nearest and against brute force, and weights with little in them."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from weights import make_weight, weights

from neoquant.errors import RequestError
from neoquant.grids import Affine, Codebook, Int8Rows
from neoquant.quantizers import QUANTIZERS
from neoquant.quantizers.hqq import Hqq
from neoquant.tensor import QuantizedTensor

KINDS: tuple[dict[str, bool], ...] = ({}, {"symmetric": True}, {"float_zero": True})
GRIDS = [Affine(bits, 32, **kind) for bits in (2, 3, 4, 8) for kind in KINDS]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
LEAST = functools.partial(Hqq, unit_gain=False)
"""With least error, as groups are before they are stored at their size."""


def group_errors(q: QuantizedTensor, w: Tensor, norm: float = 3) -> Tensor:
    """The sum of |error|**norm in each group, float64[O, G]; cubes are what groups are chosen by."""
    assert isinstance(q.grid, Affine)
    errors = (q.dequantize(torch.float32) - w.float()).double().abs() ** norm
    pieces = errors.split(q.grid.width(w.shape[1]), 1)
    return torch.stack([piece.sum(1) for piece in pieces], 1)


def nearest(w: Tensor, grid: Affine) -> QuantizedTensor:
    codes, params = grid.nearest(w)
    return QuantizedTensor(codes, grid, params, dtype=w.dtype)


@settings(deadline=None, max_examples=40)
@given(w=weights(), grid=st.sampled_from(GRIDS), norm=st.sampled_from([0.5, 0.7, 1]))
def test_no_group_is_worse_than_nearest(w: Tensor, grid: Affine, norm: float) -> None:
    found, limit = group_errors(LEAST(norm=norm).quantize(w, grid), w), group_errors(nearest(w, grid), w)
    assert (found <= limit * (1 + 1e-5) + 1e-30).all(), "float32 sums order nearly equal errors either way"


@every_grid
@pytest.mark.parametrize("norm", [0.5, 0.7, 1.0])
@pytest.mark.parametrize("unit_gain", [True, False])
def test_better_than_nearest_on_the_whole(grid: Affine, norm: float, unit_gain: bool) -> None:
    w = make_weight((64, 256), torch.float32, "normal")
    q, plain = Hqq(norm=norm, unit_gain=unit_gain).quantize(w, grid), nearest(w, grid)
    for power in (norm, 2, 3):
        assert group_errors(q, w, power).sum() < group_errors(plain, w, power).sum(), power


@settings(deadline=None, max_examples=40)
@given(w=weights(), bits=st.sampled_from([2, 3, 4, 8]))
def test_groups_with_float_zeros_keep_their_size(w: Tensor, bits: int) -> None:
    """Values have the weights' mean, and <w, value> = <w, w> about it: as far as float16 scales and zeros say it."""
    q = Hqq().quantize(w, Affine(bits, 32, float_zero=True))
    scale, zero = (q.params[name].double() for name in ("scale", "zero"))
    pairs = zip(w.double().split(32, 1), q.dequantize(torch.float32).double().split(32, 1), strict=True)
    for group, (weight, value) in enumerate(pairs):
        size, step = weight.square().sum(1), scale[:, group]
        off_by = 2.0**-11 * zero[:, group].abs().clamp(min=2.0**-14) * step + 1e-5 * weight.abs().amax(1)
        same_mean = (weight - value).mean(1).abs() <= off_by
        weight, value = (each - each.mean(1, keepdim=True) for each in (weight, value))
        square, along = weight.square().sum(1), (weight * value).sum(1)
        rounding = 1e-4 + 2.0**-11 + 2.0**-25 / step.clamp(min=2.0**-25)  # subnormal scales are coarser
        flat = along <= 2e-6 * size  # one weight, or one code
        assert ((same_mean & ((along - square).abs() <= rounding * square)) | flat).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_least_error_is_too_small(bits: int) -> None:
    """What unit gain is for."""
    random = torch.Generator().manual_seed(bits)
    w, grid = torch.randn(64, 256, generator=random), Affine(bits, 32, float_zero=True)
    least, ours = (quantizer.quantize(w, grid).dequantize().double() for quantizer in (LEAST(), Hqq()))
    size = w.double().square().sum()
    assert (w * least).sum() < 0.998 * size and abs(float((w * ours).sum() / size) - 1) < 2e-4
    assert (ours - w).square().sum() < 1.1 * (least - w).square().sum(), "it costs little of the error"


def least_error(w: Tensor, grid: Affine) -> float:
    """The least sum of cubed errors of one small group over every zero and a fine mesh of stored scales."""
    largest = float(w.abs().max())
    scales = torch.linspace(0.02, 2, 2000).mul(largest).to(torch.float16).unique().double()
    zeros = [grid.middle] if grid.symmetric else range(grid.top + 1)
    least = float("inf")
    for zero in zeros:
        values = (torch.arange(grid.top + 1) - zero)[:, None, None] * scales[None, :, None]
        errors = (values - w.double()).abs().amin(0) ** 3  # every code is tried
        least = min(least, float(errors.sum(1).min()))
    return least


@pytest.mark.parametrize("grid", [Affine(2, -1), Affine(2, -1, True), Affine(3, -1), Affine(3, -1, True)], ids=str)
def test_between_nearest_and_brute_force(grid: Affine) -> None:
    w = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    best = torch.tensor([[least_error(row, grid)] for row in w], dtype=torch.float64)
    found, start = group_errors(LEAST().quantize(w, grid), w), group_errors(nearest(w, grid), w)
    assert (found >= best * (1 - 2e-3)).all(), "the mesh is a little coarser than float16"
    gained, possible = (start - found).sum(), (start - best).sum()
    assert gained > 0.25 * possible


@pytest.mark.parametrize("bits", [2, 3])
def test_float_zeros_gain_most_of_what_a_mesh_of_scales_and_zeros_does(bits: int) -> None:
    grid = Affine(bits, -1, float_zero=True)
    w = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    scales = torch.linspace(0.05, 1.2, 240).mul(w.abs().max()).double()
    codes = torch.arange(grid.top + 1).double()
    least = torch.full((12, 1), torch.inf, dtype=torch.float64)
    for zero in torch.linspace(-0.5, grid.top + 0.5, 20 * (grid.top + 1)).double():
        values = (codes - zero)[:, None] * scales
        errors = (values[:, :, None, None] - w.double()).abs().amin(0) ** 3
        least = torch.minimum(least, errors.sum(2).amin(0)[:, None])
    found, start = group_errors(LEAST().quantize(w, grid), w), group_errors(nearest(w, grid), w)
    assert (start - found).sum() > 0.5 * (start - least).sum() > 0


def solved_at_a_fixed_scale(w: Tensor, bits: int, width: int) -> Tensor:
    """What the source describes, with p = 0.7: the zero of each group solved for in 20 iterations, in double
    precision, at the scale that covers its range. The weight that remains, [O, I]."""
    groups, top = w.double().view(len(w), -1, width), 2**bits - 1
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale, beta = (high - low) / top, 10.0
    zero = -low / scale
    for _ in range(20):
        codes = (groups / scale + zero).round().clamp(0, top)
        error = groups - (codes - zero) * scale
        shrunk = (error.abs() - error.abs() ** -0.3 / beta).clamp(min=0) * error.sign()
        zero = (codes - (groups - shrunk) / scale).mean(2, keepdim=True)
        beta *= 1.01
    return (((groups / scale + zero).round().clamp(0, top) - zero) * scale).view(w.shape)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["normal", "student"])
def test_float_zeros_lose_less_than_the_source_that_solves_for_them_alone(bits: int, kind: str) -> None:
    random = torch.Generator().manual_seed(bits)
    w = torch.randn(64, 256, generator=random) * 0.05
    if kind == "student":  # long tails, as trained weights have
        w /= torch.randn(64, 256, 5, generator=random).square().mean(2).sqrt()
    source = solved_at_a_fixed_scale(w, bits, 32)
    ours = Hqq().quantize(w, Affine(bits, 32, float_zero=True)).dequantize().double()
    for power in (2, 3):
        assert ((ours - w) ** power).abs().sum() < 0.97 * ((source - w) ** power).abs().sum()


@every_grid
def test_codes_are_the_nearest_of_their_parameters(grid: Affine) -> None:
    """And with unit gain the same codes."""
    w = make_weight((8, 80), torch.float32, "normal")
    q = LEAST().quantize(w, grid)
    errors = torch.stack(
        [(grid.decode(torch.full_like(q.codes, code), q.params) - w).abs() for code in range(grid.top + 1)]
    )
    assert torch.allclose((q.dequantize() - w).abs(), errors.amin(0), atol=1e-6)
    assert torch.equal(q.codes, Hqq().quantize(w, grid).codes)


@every_grid
def test_groups_are_solved_alone(grid: Affine) -> None:
    """Neither the rows beside a group, nor the groups beside it, nor the piece that it is solved in change it."""
    w = make_weight((300, 208), torch.float16, "normal")  # several pieces, and a short last group
    q = Hqq().quantize(w, grid)
    assert q.equals(Hqq().quantize(w, grid)), "and two runs are equal"
    for rows, columns in itertools.product((slice(0, 1), slice(150, 157)), (slice(64, 128), slice(192, 208))):
        part = Hqq().quantize(w[rows, columns], grid)
        assert torch.equal(part.codes, q.codes[rows, columns])
        groups = slice(columns.start // 32, -(-columns.stop // 32))
        assert all(torch.equal(part.params[name], q.params[name][rows, groups]) for name in q.params)


@every_grid
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 70)], ids=str)
def test_weights_with_little_in_them(grid: Affine, shape: tuple[int, int]) -> None:
    zero = Hqq().quantize(torch.zeros(shape), grid).dequantize()
    assert torch.equal(zero, torch.zeros(shape))
    for value in (-0.37, 1.0, 6e4, 2.0**-20):
        w = torch.full(shape, value)
        error = (Hqq().quantize(w, grid).dequantize() - w).abs().max()
        assert error <= (nearest(w, grid).dequantize() - w).abs().max()


def test_what_cannot_be_is_refused() -> None:
    assert QUANTIZERS["hqq"] is Hqq and not Hqq.needs_calibration
    for grid in (Codebook("nf4"), Int8Rows()):
        reason = Hqq().refuse(grid)
        assert reason is not None and grid.name in reason
        with pytest.raises(RequestError, match=grid.name):
            Hqq().quantize(torch.ones(2, 64), grid)
    for options, words in (
        ({"norm": 0}, "norm 0: legal is more than 0, at most 1"),
        ({"norm": 1.5}, "norm 1.5"),
        ({"iterations": 0}, "iterations 0: legal is 1 or more"),
        ({"unit_gain": 1}, "unit_gain is true or false, got 1"),
    ):
        with pytest.raises(RequestError, match=words):
            Hqq(**options)
