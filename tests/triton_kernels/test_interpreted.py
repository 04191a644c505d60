"""Every program in Triton's interpreter, against float64 and the reference, on shapes ragged and tiny."""

from __future__ import annotations

import itertools
import os
import random

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's interpreter is off: make test-triton", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: make test-triton")

from neoquant.errors import RequestError
from neoquant.grids import Affine, Codebook, Grid, Mxfp4, make_grid
from neoquant.kernels import Reference, Triton, native_weight
from neoquant.kernels.triton import launch
from neoquant.kernels.triton.kernel import packed_weight
from neoquant.quantizers import Nearest
from neoquant.tensor import QuantizedTensor

GRIDS: list[Grid] = [
    Codebook("nf4", 64, True),
    Codebook("nf4", 64, False),
    Codebook("nf4", 512, True),
    Codebook("fp4", 32, True),
    Mxfp4(),
    make_grid(8, "int8"),
    *(Affine(bits, group, symmetric) for bits in (2, 3, 4, 8) for group, symmetric in ((16, False), (128, True))),
    Affine(3, -1, False),
    *(Affine(bits, 16, float_zero=True) for bits in (2, 3, 4, 8)),
    Affine(4, -1, float_zero=True),
    Affine(4, -1, True),
]
KERNEL = Triton()


def name(grid: Grid) -> str:
    return "-".join(str(value) for value in grid.describe().values())


def shapes(grid: Grid, seed: int) -> list[tuple[int, int]]:
    """Weights that the grid holds and the programs run: one row, ragged rows, many groups."""
    draw = random.Random(seed)
    width = grid.decoding.width(1 << 20)
    steps = width if grid.decoding.flat or isinstance(grid, Mxfp4) else 1
    found = []
    while len(found) < (3 if seed < 5 else 2):
        shape = (draw.choice([1, 3, 9, 17, 40]), steps * draw.randint(1, max(1, 400 // steps)))
        if native_weight.refuse(grid, shape) is None:
            found.append(shape)
    return found


def weight(grid: Grid, shape: tuple[int, int], ordered: bool, seed: int = 0) -> QuantizedTensor:
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=random) * torch.rand(shape[0], 1, generator=random)
    q = Nearest().quantize(w, grid)
    if not ordered:
        return q
    order = torch.randperm(shape[1], generator=random).int()
    return QuantizedTensor(q.codes, grid, q.params, order, q.dtype)


def may_be_ordered(grid: Grid) -> list[bool]:
    return [False] if isinstance(grid, Codebook | Mxfp4) else [False, True]


def bound(x: Tensor, w: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding may come to: of each product and the sum in float32, of weights and the result in x's type."""
    unit = max(torch.finfo(dtype).eps, 2**-20)
    return unit * (x.double().abs() @ w.double().abs().T + exact.abs())


@pytest.mark.parametrize("grid", GRIDS, ids=name)
@pytest.mark.parametrize("rows", [1, 3, 5, 64])
def test_products_are_those_of_float64(grid: Grid, rows: int) -> None:
    dtypes = [torch.float32, torch.float16, torch.bfloat16]
    if rows > launch.FEW:
        del dtypes[2]  # the interpreter's tl.dot takes bfloat16 for integers
    for (shape, dtype), ordered in itertools.product(
        zip(shapes(grid, rows), dtypes, strict=False), may_be_ordered(grid)
    ):
        q = weight(grid, shape, ordered)
        x, bias = torch.randn(rows, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
        w = q.dequantize(torch.float32)
        exact = x.double() @ w.double().T + bias.double()
        y = KERNEL.linear(x, KERNEL.pack(q), grid, shape, bias)
        assert y.dtype == dtype and y.shape == exact.shape
        assert ((y.double() - exact).abs() <= bound(x, w, exact, dtype)).all()


@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_decoded_weights_and_rows_are_the_references_to_the_bit(grid: Grid) -> None:
    for shape, ordered in itertools.product([*shapes(grid, 99), *UNALIGNED.get(name(grid), [])], may_be_ordered(grid)):
        q = weight(grid, shape, ordered)
        state = KERNEL.pack(q)
        ids = torch.randint(0, shape[0], (2, 3))
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            whole = launch.decode(packed_weight(state, grid, shape), dtype)
            rows = KERNEL.embedding(ids, state, grid, shape, dtype)
            assert same(whole, q.dequantize(dtype))
            assert same(rows, Reference().embedding(ids, Reference().pack(q), grid, shape, dtype))
        assert KERNEL.unpack(state, grid, shape, q.dtype).equals(q)


def same(found: Tensor, expected: Tensor) -> bool:
    """Every bit; but the interpreter cuts bfloat16 off instead of rounding it."""
    if found.dtype != torch.bfloat16:
        return torch.equal(found, expected)
    return bool(((found.float() - expected.float()).abs() <= 2**-7 * expected.float().abs()).all())


UNALIGNED = {"nf4-64-True": [(5, 24), (3, 7)], "nf4-64-False": [(7, 33)], "fp4-32-True": [(9, 100)]}
"""Blocks that cross rows, which are decoded, and then multiplied by torch."""


@pytest.mark.parametrize("which", UNALIGNED)
def test_blocks_that_cross_rows_are_decoded(which: str) -> None:
    (grid,) = (grid for grid in GRIDS if name(grid) == which)
    for shape, rows in itertools.product(UNALIGNED[which], (1, 9)):
        q = weight(grid, shape, False)
        x = torch.randn(rows, shape[1])
        y = KERNEL.linear(x, KERNEL.pack(q), grid, shape, None)
        assert torch.allclose(y, x @ q.dequantize(torch.float32).T, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_what_follows_a_product(rows: int) -> None:
    grid, shape = Affine(4, 32), (24, 96)
    q = weight(grid, shape, False)
    state = KERNEL.pack(q)
    x, bias, residual = torch.randn(rows, 96), torch.randn(24), torch.randn(rows, 24)
    plain = x.double() @ q.dequantize(torch.float32).double().T + bias.double()
    expected = torch.nn.functional.gelu(plain, approximate="tanh") + residual.double()
    y = launch.multiply(x, packed_weight(state, grid, shape), bias, "gelu_new", residual)
    assert (y.double() - expected).abs().max() < 1e-4
    far = launch.multiply(1e4 * x, packed_weight(state, grid, shape), bias, "gelu_new")
    assert far.isfinite().all()


@pytest.mark.parametrize("rows", [1, 4, 20])
@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_three_products_in_one_launch_are_those_of_three(grid: Grid, rows: int) -> None:
    for shape, ordered in itertools.product(shapes(grid, 7)[:1], may_be_ordered(grid)):
        weights = [
            packed_weight(KERNEL.pack(weight(grid, shape, ordered, seed)), grid, shape) for seed in range(3)
        ]  # fmt: skip
        x = torch.randn(rows, shape[1])
        y = launch.multiply_by_three(x, weights)
        assert y.shape == (3, rows, shape[0])
        for found, one in zip(y, weights, strict=True):
            assert torch.equal(found, launch.multiply(x, one))


def attended(qkv: Tensor, keys: Tensor, values: Tensor, at: int, keep: Tensor | None) -> Tensor:
    """By definition, position by position, in float64; keys and values[B, H, P, D] of all positions before."""
    B, H, P, D = keys.shape
    query, key, value = (states.view(B, H, 1, D).double() for states in qkv)
    keys, values = torch.cat([keys.double(), key], 2), torch.cat([values.double(), value], 2)
    scores = query @ keys.transpose(2, 3)
    if keep is not None:
        hidden = ~keep[:, at - P : at]
        scores[..., :P].masked_fill_(hidden[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ values).transpose(1, 2).reshape(B, H * D)


@pytest.mark.parametrize("S, at", [(32, 0), (32, 7), (48, 47), (48, 48), (48, 200), (1, 5), (100, 99), (16, 15)])
@pytest.mark.parametrize("stretch", [256, 16, 37])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_to_a_ring(S: int, at: int, stretch: int, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lies in places that no position has reached, and whether one program or several attend."""
    monkeypatch.setattr(launch, "STRETCH", stretch)
    B, H, D = 2, 3, 20 if S == 48 else 16
    random = torch.Generator().manual_seed(S + at)
    qkv = torch.randn(3, B, H * D, generator=random)
    before, held = torch.randn(2, B, H, at, D, generator=random), min(at, S - 1)
    rings = torch.full((2, B, H, S, D), torch.nan)
    for position in range(max(0, at - S), at):
        rings[:, :, :, position % S] = before[:, :, :, position]
    keep = torch.rand(B, at + 5, generator=random) < 0.5 if padded else None
    if keep is not None:
        keep[0, :at] = False
    keys, values = rings.unbind()
    y = launch.attend(qkv, keys, values, torch.tensor([at]), keep)
    expected = attended(qkv, *before[:, :, :, at - held :], at, keep)
    assert torch.allclose(y.double(), expected, atol=1e-5)
    for ring, states in ((keys, qkv[1]), (values, qkv[2])):
        assert torch.equal(ring[:, :, at % S], states.view(B, H, D))


def test_gradients_reach_the_activations() -> None:
    grid, shape = Codebook(), (16, 128)
    q = weight(grid, shape, False)
    for rows in (2, 70):
        x = torch.randn(rows, 128, requires_grad=True)
        KERNEL.linear(x, KERNEL.pack(q), grid, shape, None).square().sum().backward()
        w = q.dequantize(torch.float32)
        assert x.grad is not None and torch.allclose(x.grad, 2 * (x.detach() @ w.T) @ w, atol=1e-3)


def test_an_id_that_is_no_row_is_refused() -> None:
    q = weight(Codebook(), (8, 64), False)
    with pytest.raises(IndexError, match="ids are 0 to 7, got 8 to 8"):
        KERNEL.embedding(torch.tensor([8]), KERNEL.pack(q), Codebook(), (8, 64), torch.float32)


def test_refusals_say_why() -> None:
    here, there = torch.device("cpu"), torch.device("cuda")
    assert KERNEL.refuse(Codebook(), (8, 64), there) is None
    assert "on CUDA, not on cpu" in str(KERNEL.refuse(Codebook(), (8, 64), here))
    assert "2,147,483,647 weights" in str(KERNEL.refuse(Codebook(), (1 << 20, 1 << 12), there))
    with pytest.raises(RequestError):
        Codebook("nf4", 48)
