"""Activations rounded to int8 by Triton's programs: what the reference does, by integers."""

from __future__ import annotations

import os
import random

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's interpreter is off: make test-triton", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: make test-triton")

from simulated_cuda.device import Counts

from neoquant.grids import Affine, Codebook, Grid, Mxfp4, make_grid
from neoquant.kernels import ReferenceInt8, TritonInt8, native_weight
from neoquant.nn.linear import QuantLinear
from neoquant.quantizers import Nearest
from neoquant.tensor import QuantizedTensor

CUDA = torch.device("cuda")
GRIDS: list[Grid] = [
    Codebook("nf4", 64, True),
    Codebook("nf4", 512, True),
    Codebook("fp4", 32, False),
    Mxfp4(),
    make_grid(8, "int8"),
    *(Affine(bits, group, symmetric) for bits in (2, 3, 4, 8) for group, symmetric in ((16, False), (128, True))),
    *(Affine(bits, 32, float_zero=True) for bits in (3, 8)),
    Affine(8, 64),
    Affine(4, -1),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_products_are_the_references(grid: Grid) -> None:
    """Of ragged rows and few ones, with outliers, zeros, an order, a bias; exactly the reference's rounding."""
    draw, found = random.Random(grid.bits), 0
    width = grid.decoding.width(1 << 20) if grid.decoding.flat else 1
    while found < 3:
        shape = (draw.choice([1, 9, 40]), width * draw.randint(1, max(1, 300 // width)))
        if native_weight.refuse(grid, shape) or TritonInt8().refuse(grid, shape, CUDA):
            continue
        found += 1
        q = Nearest().quantize(torch.randn(shape, generator=torch.Generator().manual_seed(found)), grid)
        if not isinstance(grid, Codebook | Mxfp4):
            q = QuantizedTensor(q.codes, grid, q.params, torch.randperm(shape[1]).int(), q.dtype)
        x, bias = torch.randn([1, 5, 70][found - 1], shape[1]), torch.randn(shape[0])
        x[:, shape[1] // 2] *= 100
        x[-1, : shape[1] // 3] = 0
        expected = ReferenceInt8().linear(x, ReferenceInt8().pack(q), grid, shape, bias)
        y = TritonInt8().linear(x, TritonInt8().pack(q), grid, shape, bias)
        length = x.double().norm(dim=1, keepdim=True) * q.dequantize(torch.float64).norm(dim=1) + bias.abs()
        assert ((y - expected).abs() <= 8 * torch.finfo(torch.float32).eps * shape[1] ** 0.5 * length).all()


def test_what_is_not_a_number_is_not_lost() -> None:
    grid, shape = Codebook(), (8, 128)
    q, x = Nearest().quantize(torch.randn(shape), grid), torch.randn(4, 128)
    x[0, 3], x[1, 100] = torch.nan, torch.inf
    y = TritonInt8().linear(x, TritonInt8().pack(q), grid, shape, None)
    assert y.isnan().all(1).tolist() == [True, True, False, False]


def test_types_and_gradients() -> None:
    grid, shape = Affine(4, 32), (12, 64)
    q, x = Nearest().quantize(torch.randn(shape), grid), torch.randn(3, 64)
    state, exact = TritonInt8().pack(q), ReferenceInt8().linear(x, ReferenceInt8().pack(q), grid, shape, None)
    for dtype in (torch.float16, torch.float64):
        y = TritonInt8().linear(x.to(dtype), state, grid, shape, None)
        assert y.dtype == dtype and torch.allclose(y.float(), exact, rtol=1e-2, atol=5e-2)
    x.requires_grad_()
    TritonInt8().linear(x, state, grid, shape, None).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, q.dequantize(torch.float32).sum(0).expand(3, 64), atol=1e-4)


def test_blocks_that_cross_rows_are_refused() -> None:
    assert "cross rows of 33" in str(TritonInt8().refuse(Codebook("nf4", 64, False), (64, 33), CUDA))
    assert "on CUDA, not on cpu" in str(TritonInt8().refuse(Codebook(), (64, 64), torch.device("cpu")))


@pytest.mark.parametrize("grid", [Codebook(), Affine(3, 32), Mxfp4()], ids=str)
def test_a_layer_is_two_launches(grid: Grid, gpu: Counts) -> None:
    """However many rows meet it."""
    layer = QuantLinear(Nearest().quantize(torch.randn(12, 128), grid), torch.randn(12)).to("cuda")
    layer.set_activations("int8")
    assert layer.kernel.name == "triton-int8"
    with torch.inference_mode():
        layer(torch.randn(1, 128, device="cuda"))  # tables are made once
        for rows in (1, 64, 300):
            x = torch.randn(rows, 128, device="cuda")
            gpu.reset()
            layer(x)
            assert gpu.totals() == (2, 0, 0)
