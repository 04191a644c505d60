"""Grids: bitsandbytes' own bytes, and plain torch that agrees with them."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from weights import DTYPES, make_weight, weights

from neoquant import grids
from neoquant.errors import FormatError, RequestError
from neoquant.grids import BLOCK_SIZES, Affine, Codebook, Grid, Int8Rows, grid_from_dict, legal_pairs, make_grid
from neoquant.packing import pack_nibbles

codebooks = st.builds(Codebook, st.sampled_from(["nf4", "fp4"]), st.sampled_from(BLOCK_SIZES), st.booleans())
CPU = torch.device("cpu")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal types, shapes and bits: 0.0 is not -0.0, NaN is NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def test_tables_are_bitsandbytes_own() -> None:
    for kind in ("nf4", "fp4"):
        assert same_bits(Codebook(kind).table(), bnb.get_4bit_type(kind, device="cpu"))
    assert torch.equal(grids.double_quant_table(CPU), bnb.create_dynamic_map())


@settings(deadline=None, max_examples=200)
@given(w=weights(), grid=codebooks)
def test_codebook_gives_bitsandbytes_bytes(w: Tensor, grid: Codebook) -> None:
    codes, params = grid.nearest(w)
    packed, state = bnb.quantize_4bit(
        w, blocksize=grid.block_size, quant_type=grid.kind, compress_statistics=grid.double_quant
    )
    assert same_bits(pack_nibbles(codes.view(-1), pad=grid.zero_code), packed.view(-1))
    assert same_bits(params["absmax"], state.absmax)
    if grid.double_quant:
        assert same_bits(params["nested_absmax"], state.state2.absmax)
        assert same_bits(params["nested_offset"], state.offset)
    grid.check(params, tuple(w.shape))


@settings(deadline=None, max_examples=60)
@given(w=weights())
def test_int8_gives_bitsandbytes_bytes(w: Tensor) -> None:
    codes, params = Int8Rows().nearest(w)
    expected, scb, _ = bnb.int8_vectorwise_quant(w.to(torch.float16))
    assert same_bits(codes.view(torch.int8), expected)
    assert same_bits(params["scb"], scb)


@settings(deadline=None, max_examples=80)
@given(w=weights(), grid=codebooks)
def test_plain_torch_agrees_with_bitsandbytes(w: Tensor, grid: Codebook) -> None:
    codes, params = grid.nearest(w)
    fitted = grid.fit(w)
    assert all(same_bits(fitted[name], params[name]) for name in params)
    if not grid.double_quant:  # with it, nearest uses the absmax before they are rounded, as bitsandbytes does
        assert torch.equal(grid.round(w, fitted), codes)


@settings(deadline=None, max_examples=40)
@given(w=weights())
def test_plain_torch_agrees_with_bitsandbytes_int8(w: Tensor) -> None:
    grid = Int8Rows()
    codes, params = grid.nearest(w)
    assert same_bits(grid.fit(w)["scb"], params["scb"])
    assert torch.equal(grid.round(w, params), codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_decode_is_bitsandbytes_dequantize(kind: str, double_quant: bool, dtype: torch.dtype) -> None:
    w = make_weight((48, 256), dtype, "normal")
    grid = Codebook(kind, 64, double_quant)
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type=kind, compress_statistics=double_quant)
    assert torch.equal(grid.decode(*grid.nearest(w), dtype), bnb.dequantize_4bit(packed, state))


def test_int8_decode_is_bitsandbytes_dequantize() -> None:
    codes, params = Int8Rows().nearest(make_weight((48, 250), torch.float16, "normal"))
    ours = Int8Rows().decode(codes, params)
    theirs = bnb.int8_vectorwise_dequant(codes.view(torch.int8), params["scb"])
    assert torch.allclose(ours, theirs, rtol=2**-22, atol=0)


@settings(deadline=None, max_examples=40)
@given(w=weights(max_rows=8), grid=codebooks)
def test_codebook_decode_against_its_definition(w: Tensor, grid: Codebook) -> None:
    codes, params = grid.nearest(w)
    flat, absmax = codes.view(-1).tolist(), grid.scales(params)
    values = [grid.table()[code] * absmax[i // grid.block_size] for i, code in enumerate(flat[:400])]
    assert torch.equal(grid.decode(codes, params).view(-1)[:400], torch.stack(values))


@pytest.mark.parametrize("grid", [Codebook("nf4", 64, False), Codebook("fp4", 512), Int8Rows(), Affine(3, 32)])
def test_pieces_do_not_show(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    w = make_weight((97, 131), torch.float32, "normal")
    codes, params = grid.nearest(w)
    whole = grid.decode(codes, params), grid.round(w, params), grid.fit(w)
    monkeypatch.setattr(grids.base, "CHUNK", 4096)
    again, params_again = grid.nearest(w)
    assert torch.equal(codes, again)
    assert all(same_bits(params[name], params_again[name]) for name in params)
    assert torch.equal(grid.decode(codes, params), whole[0])
    assert torch.equal(grid.round(w, params), whole[1])
    assert all(same_bits(value, grid.fit(w)[name]) for name, value in whole[2].items())


@pytest.mark.parametrize(("bits", "name"), legal_pairs())
def test_values_are_fixed_points(bits: int, name: str) -> None:
    grid = make_grid(bits, name)
    codes, params = grid.nearest(make_weight((16, 128), torch.float16, "normal"))
    w = grid.decode(codes, params)
    assert torch.equal(grid.decode(grid.round(w, params), params), w)


@pytest.mark.parametrize("grid", [Codebook(), Codebook("fp4", 64, False), Int8Rows(), Affine(), Affine(2, -1, True)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(grid: Grid, bad: float) -> None:
    w = make_weight((8, 80), torch.float32, "normal")
    w[7, 79] = bad
    for fitted in (grid.nearest, grid.fit):
        with pytest.raises(FormatError, match="holds infinity or NaN"):
            fitted(w)


def test_int8_says_that_float16_is_too_small() -> None:
    w = make_weight((4, 8), torch.bfloat16, "normal")
    w[2, 3] = 1e5
    for fitted in (Int8Rows().nearest, Int8Rows().fit):
        with pytest.raises(FormatError, match="float16, which ends at 65504; the largest weight is 99840"):
            fitted(w)


@pytest.mark.parametrize(
    "grid", [make_grid(bits, name) for bits, name in legal_pairs()] + [Codebook("fp4", 4096, False)]
)
def test_descriptions_round_trip(grid: Grid) -> None:
    assert grid_from_dict(grid.describe()) == grid


def test_illegal_requests_name_the_legal_ones() -> None:
    for bits, name in ((3, "nf4"), (4, "int8"), (8, "nf4"), (4, "int4")):
        with pytest.raises(
            RequestError,
            match="legal pairs of bits and type are 4 nf4, 4 fp4, 8 int8, 2 affine, 3 affine, 4 affine, 8 affine",
        ):
            make_grid(bits, name)
    with pytest.raises(RequestError, match="block size 48: legal are 32, 64, 128, 256, 512, 1024, 2048, 4096"):
        make_grid(4, "nf4", block_size=48)
    with pytest.raises(RequestError, match="int8 does not know block_size; it has no options"):
        make_grid(8, "int8", block_size=64)
    with pytest.raises(RequestError, match="no grid is called 'nf3'; there are nf4, fp4, int8, affine"):
        grid_from_dict({"name": "nf3"})
    with pytest.raises(RequestError, match="nf4: 'bits' are not its fields"):
        grid_from_dict({"name": "nf4", "bits": 4})
    with pytest.raises(RequestError, match=r"block size 64\.0: legal are"):
        grid_from_dict({"name": "nf4", "block_size": 64.0})
    with pytest.raises(RequestError, match=r"no grid is called \['nf4'\]"):
        grid_from_dict({"name": ["nf4"]})
    assert make_grid(4, "fp4", block_size=None, double_quant=False) == Codebook("fp4", 64, False)


def test_wrong_parameters_are_refused() -> None:
    grid = Codebook("nf4", 64, False)
    with pytest.raises(FormatError, match=r"has the parameters \['absmax'\], got \['scb'\]"):
        grid.check({"scb": torch.ones(1)}, (2, 64))
    with pytest.raises(FormatError, match="absmax of a nf4 weight holds infinity or NaN"):
        grid.check({"absmax": torch.tensor([1.0, float("nan")])}, (2, 64))
    with pytest.raises(FormatError, match=r"is torch.float32 \[2\], got torch.float32 \[3\]"):
        grid.check({"absmax": torch.ones(3)}, (2, 64))
