"""Quantized layers under torch's compiler: one operator each, whole graphs, the values and gradients of eager mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import neoquant
from neoquant.grids import GRIDS, Grid
from neoquant.kernels import KERNELS, ROUNDING, Kernel, operators
from neoquant.nn.linear import QuantEmbedding, QuantLinear
from neoquant.quantizers import Nearest
from neoquant.tensor import QuantizedTensor

CPU = torch.device("cpu")
MADE = [grid() for grid in GRIDS.values()]
CASES = [
    pytest.param(grid, kernel, id=f"{grid.name} by {kernel.name}")
    for grid in MADE
    for kernel in (*KERNELS.values(), *ROUNDING.values())
    if kernel.refuse(grid, (12, 64), CPU) is None
]


def quantized(grid: Grid, shape: tuple[int, int] = (12, 64)) -> QuantizedTensor:
    return Nearest().quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)).half(), grid)


def given(layer: QuantLinear) -> tuple[list[torch.Tensor], str]:
    return list(layer.state.values()), layer.described


@pytest.mark.parametrize(("grid", "kernel"), CASES)
def test_operators_keep_torchs_rules(grid: Grid, kernel: Kernel) -> None:
    """torch's own check of operators: schema, shapes that are made up, dispatch under autograd."""
    layer = QuantLinear(quantized(grid), kernel=kernel)
    state, what = given(layer)
    x, ids = torch.randn(2, 3, 64), torch.tensor([[0, 11, 4]])
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for arguments in ((x, state, what, None), (x, state, what, torch.randn(12))):
        torch.library.opcheck(operators.linear, arguments, test_utils=tests)
    torch.library.opcheck(operators.linear_backward, (torch.randn(2, 3, 12), state, what), test_utils=tests)
    torch.library.opcheck(operators.embedding, (ids, state, what, torch.float16), test_utils=tests)


@pytest.mark.parametrize(("grid", "kernel"), CASES)
def test_operators_are_the_kernel(grid: Grid, kernel: Kernel) -> None:
    bias = torch.randn(12, generator=torch.Generator().manual_seed(1))
    layer = QuantLinear(quantized(grid), bias, kernel=kernel)
    state, what = given(layer)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    expected, found = layer(x), operators.linear(x, state, what, bias)
    assert torch.equal(found, expected)
    grad = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(3))
    theirs, ours = (torch.autograd.grad(y, x, grad)[0] for y in (expected, found))
    exact = (grad.double() @ layer.quantized.dequantize(torch.float64)).float()
    assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()
    if kernel.activations == "exact":
        assert (theirs - exact).abs().max() <= 1e-5 * exact.abs().max()
    ids = torch.tensor([[5, 0], [11, 5]])
    assert torch.equal(operators.embedding(ids, state, what, torch.float16), layer.embedding(ids, torch.float16))


def test_another_kernel_is_told_of_to_compilers() -> None:
    layer = QuantLinear(quantized(MADE[0]))
    before = layer.described
    layer.set_activations("int8")
    assert layer.described != before
    x = torch.randn(5, 64)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return neoquant.AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config="mxfp4")


def test_a_model_is_one_graph(model: Any) -> None:
    """With positions and padding."""
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert any(isinstance(module, QuantEmbedding) for module in model.modules())
    with torch.no_grad():
        for T in (9, 17):
            ids = torch.randint(1, 259, (2, T), generator=torch.Generator().manual_seed(T))
            keep = torch.ones_like(ids)
            keep[1, -3:] = 0
            positions = torch.arange(T)[None].expand(2, -1).flip(1)
            for given in ({}, {"attention_mask": keep}, {"position_ids": positions}):
                expected = model(ids, use_cache=False, **given).logits
                found = compiled(ids, use_cache=False, **given).logits
                assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_a_model_is_exported_for_every_length(model: Any) -> None:
    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(ids, use_cache=False).logits
            return logits

    lengths = {"ids": {0: torch.export.Dim("rows", min=1, max=64), 1: torch.export.Dim("length", min=2, max=32)}}
    with torch.no_grad():
        program = torch.export.export(Logits(), (torch.ones(2, 9, dtype=torch.int64),), dynamic_shapes=lengths)
        names = {str(node.target) for node in program.graph.nodes}
        assert {"neoquant.linear.default", "neoquant.embedding.default"} <= names
        for rows, T in ((1, 2), (2, 9), (3, 32)):
            ids = torch.randint(1, 259, (rows, T), generator=torch.Generator().manual_seed(T))
            expected = model(ids).logits
            assert (program.module()(ids) - expected).abs().max() <= 2e-5 * expected.abs().max()
