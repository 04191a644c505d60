"""Affine grids: against their definition, at every number of bits and group size, ragged rows included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import SIZES, checkpoint_of
from torch import Tensor
from weights import make_weight, weights

from neoquant.errors import FormatError, RequestError
from neoquant.formats import FORMATS
from neoquant.grids import GROUP_SIZES, Affine, grid_from_dict, make_grid
from neoquant.quantization.plan import make_plan
from neoquant.quantization.recipe import Recipe

kinds = st.sampled_from([{}, {"symmetric": True}, {"float_zero": True}])
grids = st.builds(
    lambda bits, group, kind: Affine(bits, group, **kind),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from(GROUP_SIZES),
    kinds,
)


def group_of(grid: Affine, column: int) -> int:
    return 0 if grid.group_size == -1 else column // grid.group_size


@settings(deadline=None, max_examples=60)
@given(w=weights(max_rows=6), grid=grids)
def test_decode_against_its_definition(w: Tensor, grid: Affine) -> None:
    codes, params = grid.nearest(w)
    grid.check(params, tuple(w.shape))
    found = grid.decode(codes, params)
    assert found.isfinite().all() and int(codes.max()) <= grid.top
    for column in range(min(w.shape[1], 300)):
        group = group_of(grid, column)
        zero = grid.middle if grid.symmetric else params["zero"][:, group].float()
        assert torch.equal(found[:, column], (codes[:, column].float() - zero) * params["scale"][:, group].float())


@settings(deadline=None, max_examples=60)
@given(w=weights(max_rows=6), grid=grids, search=st.booleans())
def test_codes_are_the_nearest_under_the_stored_parameters(w: Tensor, grid: Affine, search: bool) -> None:
    params = grid.fit(w, search)
    error = (grid.decode(grid.round(w, params), params) - w.float()).abs()
    for code in range(0, grid.top + 1, max(1, grid.top // 16)):
        other = grid.decode(torch.full(w.shape, code, dtype=torch.uint8), params)
        assert (error <= (other - w.float()).abs() + 1e-6 * w.float().abs().max()).all()


@settings(deadline=None, max_examples=60)
@given(w=weights(max_rows=6), grid=grids, search=st.booleans())
def test_columns_round_as_the_whole_does(w: Tensor, grid: Affine, search: bool) -> None:
    params = grid.fit(w, search)
    codes = grid.round(w, params)
    values = grid.decode(codes, params)
    columns = grid.columns(params, (w.shape[0], w.shape[1]))
    for j in range(0, w.shape[1], 1 + w.shape[1] // 9):
        found = columns.round(j, w[:, j].float())
        assert torch.equal(found[0], codes[:, j]) and torch.equal(found[1], values[:, j])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_search_never_loses(bits: int, symmetric: bool) -> None:
    w = make_weight((32, 200), torch.float32, "normal")
    importance = torch.linspace(0.01, 3, 200) ** 2
    grid = Affine(bits, 64, symmetric)

    def error(params: dict[str, Tensor], weight: Tensor) -> float:
        return float(((grid.decode(grid.round(w, params), params) - w).square() * weight).sum())

    plain, searched, weighted = grid.fit(w), grid.fit(w, True), grid.fit(w, True, importance)
    assert error(searched, torch.ones(200)) <= error(plain, torch.ones(200))
    assert error(weighted, importance) <= error(plain, importance)
    assert error(weighted, importance) <= error(searched, importance)
    if bits < 4:
        assert error(searched, torch.ones(200)) < 0.9 * error(plain, torch.ones(200))


def test_groups_are_fitted_apart_and_ragged_ones_too() -> None:
    w = make_weight((8, 150), torch.float32, "normal")
    grid = Affine(4, 64)
    whole = grid.fit(w)
    for group, columns in enumerate((slice(0, 64), slice(64, 128), slice(128, 150))):
        alone = grid.fit(w[:, columns])
        assert all(torch.equal(whole[name][:, group : group + 1], alone[name]) for name in whole)


def test_zero_is_a_value_and_zeros_stay() -> None:
    for grid in (Affine(2, 32), Affine(3, 32, True), Affine(4, -1)):
        w = make_weight((16, 96), torch.float32, "sparse") + 0.0
        codes, params = grid.nearest(w)
        assert (grid.decode(codes, params)[w == 0] == 0).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_float_zeros_lie_where_the_range_begins(bits: int) -> None:
    """By the definition, in double precision: scale = (high - low) / top, zero = -low / scale, each rounded to half."""
    w, grid = make_weight((9, 150), torch.float32, "normal"), Affine(bits, 64, float_zero=True)
    codes, params = grid.nearest(w)
    for group, part in enumerate(w.double().split(64, 1)):
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scale = ((high - low) / grid.top).half().double()
        assert torch.equal(params["scale"][:, group].double(), scale)
        zero = -low / scale
        assert ((params["zero"][:, group].double() - zero).abs() <= zero * 2.0**-11 * (1 + 1e-5)).all()
        steps = part / scale[:, None] + params["zero"][:, group, None].double()
        found = codes[:, 64 * group : 64 * group + part.shape[1]].double()
        assert ((found - steps.clamp(0, grid.top)).abs() <= 0.5 + 1e-4).all()
    whole = Affine(bits, 64)
    gained = [(grid_.decode(*grid_.nearest(w)) - w).square().sum() for grid_ in (grid, whole)]
    assert gained[0] <= gained[1] * 1.02, "whole zeros round the range's ends, float ones do not"


def test_float_zeros_may_lie_anywhere_but_are_numbers() -> None:
    grid, scale = Affine(2, 32, float_zero=True), torch.ones(1, 1, dtype=torch.float16)
    for zero in (-70.5, 0.0, 0.0004, 65504.0):
        params = {"scale": scale, "zero": torch.full((1, 1), zero, dtype=torch.float16)}
        grid.check(params, (1, 32))
        w = torch.linspace(-2 - zero, 5 - zero, 32)[None]
        steps = grid.group_steps(w[None], scale.float(), params["zero"].float())
        assert torch.allclose(steps[0], grid.decode(grid.round(w, params), params), atol=1e-5)
    with pytest.raises(FormatError, match="zero of a affine weight holds infinity or NaN"):
        grid.check({"scale": scale, "zero": torch.full((1, 1), torch.nan, dtype=torch.float16)}, (1, 32))
    with pytest.raises(FormatError, match=r"zero of a affine weight \[1, 32\] is torch.float16"):
        grid.check({"scale": scale, "zero": torch.zeros(1, 1, dtype=torch.uint8)}, (1, 32))


def test_float_zeros_are_said_only_where_there_are_any() -> None:
    assert "float_zero" not in Affine(4, 64).describe()
    grid = Affine(4, 64, float_zero=True)
    assert grid_from_dict(grid.describe()) == grid and grid.label == "affine4-g64-float-zero"
    assert Recipe.simple(4, "affine", group_size=64, float_zero=True, quantizer="hqq").name == "hqq4-g64-float-zero"
    for format in ("gptq", "compressed-tensors"):
        reason = FORMATS[format].refuse(grid, (64, 64))
        assert reason is not None and "not as float16; format neoquant holds them" in reason
    plan = make_plan(checkpoint_of(SIZES["1.3b"]), Recipe.simple(4, "affine", group_size=64, float_zero=True))
    assert plan.format.name == "packed" and plan.bits_per_weight_linears == pytest.approx(4 + 32 / 64, abs=0.01)


def test_what_float16_scales_cannot_hold_is_refused() -> None:
    with pytest.raises(FormatError, match="scales are float16, which ends at 65504; the largest is 100000"):
        Affine(2, 32).fit(torch.full((1, 32), 3e5))


def test_illegal_options_name_the_legal_ones() -> None:
    with pytest.raises(RequestError, match="group size 48: legal are -1, 16, 32, 64, 128, 256"):
        make_grid(4, "affine", group_size=48)
    with pytest.raises(RequestError, match="affine does not know block_size; its options are group_size and symmetric"):
        make_grid(4, "affine", block_size=64)
    with pytest.raises(RequestError, match="bits 5: affine has 2, 3, 4, 8"):
        Affine(5)
    with pytest.raises(RequestError, match="symmetric is true or false, got 1"):
        Affine(4, 64, 1)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="float_zero is true or false, got 'yes'"):
        Affine(4, 64, float_zero="yes")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"a symmetric grid stores no zeros .*: choose one of both"):
        make_grid(4, "affine", symmetric=True, float_zero=True)


def test_zeros_beyond_the_codes_are_refused() -> None:
    grid = Affine(2, 32)
    params = {"scale": torch.ones(1, 1, dtype=torch.float16), "zero": torch.full((1, 1), 4, dtype=torch.uint8)}
    with pytest.raises(FormatError, match="zeros of a weight of 2 bits end at 3, got 4"):
        grid.check(params, (1, 32))


def test_plans_foretell_sizes_and_name_ragged_groups() -> None:
    plan = make_plan(checkpoint_of(SIZES["1.3b"]), Recipe.simple(3, "affine", group_size=64, format="neoquant"))
    assert plan.bits_per_weight_linears == pytest.approx(3 + 24 / 64, abs=0.01)
    plan = make_plan(checkpoint_of(SIZES["1.3b"]), Recipe.simple(4, "affine", symmetric=True, format="neoquant"))
    assert plan.bits_per_weight_linears == pytest.approx(4 + 16 / 128, abs=0.01)
    tiny = SIZES["125m"] | {"hidden_size": 24, "num_heads": 4, "intermediate_size": 72}
    plan = make_plan(checkpoint_of(tiny), Recipe.simple(4, "affine", group_size=64, format="neoquant"))
    assert "rows of 24 are one group, shorter than the group size 64" in plan.notes
    assert "rows of 72 end in a group of 8 instead of 64" in plan.notes
