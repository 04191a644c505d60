"""With Triton, a quantized layer is one launch, whatever its grid: on the simulated device, programs interpreted."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's interpreter is off: make test-triton", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: make test-triton")

from simulated_cuda.device import Counts

from neoquant.grids import Affine, Codebook, Grid, Mxfp4, make_grid
from neoquant.nn.linear import QuantLinear
from neoquant.quantizers import Nearest
from neoquant.tensor import QuantizedTensor

GRIDS: list[Grid] = [
    Codebook(),
    Codebook("fp4", 64, False),
    Mxfp4(),
    make_grid(8, "int8"),
    Affine(3, 32),
    Affine(4, 64),
]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name + str(grid.bits))
def test_a_layer_is_one_launch_and_two_for_many_rows(grid: Grid, gpu: Counts) -> None:
    q = Nearest().quantize(torch.randn(12, 128), grid)
    here = QuantLinear(q, torch.randn(12))
    layer = QuantLinear(q, here.bias.detach()).to("cuda")  # type: ignore[union-attr]
    assert layer.kernel.name == "triton" and layer.quantized.equals(q.to("cuda"))
    with torch.inference_mode():
        layer(torch.randn(1, 128, device="cuda"))  # tables are made once
        for rows, launches in ((1, 1), (4, 1), (64, 1), (65, 2)):
            x = torch.randn(rows, 128)
            gpu.reset()
            y = layer(x.to("cuda"))
            assert gpu.totals() == (launches, 0, 1)  # x is copied
            assert torch.allclose(y.cpu(), here(x), atol=2e-4)


def test_an_order_costs_nothing_and_a_row_five(gpu: Counts) -> None:
    q = Nearest().quantize(torch.randn(12, 128), Affine(4, 32))
    ordered = QuantizedTensor(q.codes, q.grid, q.params, torch.randperm(128).int(), q.dtype)
    layer, x = QuantLinear(ordered).to("cuda"), torch.randn(2, 128)
    ids = torch.tensor([[3, 11]], device="cuda")
    with torch.inference_mode():
        gpu.reset()
        y = layer(x.to("cuda"))
        assert gpu.totals() == (1, 0, 1)
        assert torch.allclose(y.cpu(), QuantLinear(ordered)(x), atol=2e-4)
        gpu.reset()
        rows = layer.embedding(ids, torch.float32)
        assert gpu.totals() == (6, 0, 0)  # five assert that the ids are rows
        assert torch.equal(rows.cpu(), ordered.dequantize(torch.float32)[ids.cpu()])
