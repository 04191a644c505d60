"""The native library's products: every instruction set, thread count, shape and number of rows, against the values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from switch import forced
from torch import Tensor
from weights import make_weight

from neoquant import native
from neoquant.grids import BLOCK_SIZES, Codebook, Grid, Int8Rows
from neoquant.kernels import Cpu, cpu
from neoquant.kernels.cpu import FEW
from neoquant.layer import QuantLinear
from neoquant.quantizers import Nearest
from neoquant.tensor import QuantizedTensor

CPU = torch.device("cpu")
every_isa = pytest.mark.parametrize("isa", native.ISAS)
codebooks = st.builds(Codebook, st.sampled_from(["nf4", "fp4"]), st.sampled_from(BLOCK_SIZES), st.booleans())
grids = st.one_of(codebooks, st.just(Int8Rows()))
# whole chunks, what is left of them, blocks across rows, odd rows, more scales than fit at once
columns = st.one_of(st.integers(1, 200), st.sampled_from([32, 64, 96, 128, 160, 192, 224, 256, 768, 1056, 17024]))


def require_close(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None) -> None:
    """Every product and sum is off by at most one unit: sqrt(I) of them on average."""
    exact = x.double() @ w.T
    length = x.double().norm(dim=-1, keepdim=True) * w.norm(dim=1)
    if bias is not None:
        exact, length = exact + bias, length + bias.abs()
    bound = 4 * torch.finfo(x.dtype).eps * x.shape[-1] ** 0.5 * length
    assert ((y.double() - exact).abs() <= bound).all()


def require_right(grid: Grid, shape: tuple[int, int], rows: int, dtype: torch.dtype, biased: bool) -> None:
    q = Nearest().quantize(make_weight(shape, torch.float16, "normal"), grid)
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.linspace(-1, 1, shape[0], dtype=dtype) if biased else None
    y = Cpu().linear(x, Cpu().pack(q), grid, shape, bias)
    assert (y.shape, y.dtype) == ((rows, shape[0]), dtype)
    require_close(y, x, q.dequantize(torch.float64), None if bias is None else bias.double())


@every_isa
@settings(deadline=None, max_examples=60)
@given(
    grid=grids, rows=st.integers(1, 9), columns=columns, count=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 30]),
    threads=st.sampled_from([1, 2]), biased=st.booleans(),
)  # fmt: skip
def test_products_are_right(
    isa: str, grid: Grid, rows: int, columns: int, count: int, threads: int, biased: bool
) -> None:
    with forced(isa, threads):
        require_right(grid, (rows, columns), count, torch.float32, biased)


@every_isa
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("grid", [Codebook(), Codebook("fp4", 32, False), Int8Rows()], ids=str)
def test_other_types_are_computed_in_themselves(isa: str, grid: Grid, dtype: torch.dtype) -> None:
    with forced(isa):
        for count in (1, FEW + 1):
            require_right(grid, (24, 96), count, dtype, True)


@every_isa
@settings(deadline=None, max_examples=30)
@given(grid=grids, rows=st.integers(1, 9), columns=columns, threads=st.sampled_from([1, 2]))
def test_decoding_gives_the_grid_s_values(isa: str, grid: Grid, rows: int, columns: int, threads: int) -> None:
    with forced(isa, threads):
        q = Nearest().quantize(make_weight((rows, columns), torch.float32, "normal"), grid)
        w, state = torch.full((rows, columns), torch.nan), Cpu().pack(q)
        for start, piece in cpu._pieces(cpu._weight(state, grid, q.shape), torch.float32):
            w[start : start + len(piece)] = piece
        assert torch.equal(w, q.dequantize(torch.float32))


@pytest.mark.parametrize("grid", [Codebook(), Int8Rows()], ids=str)
def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch, grid: Grid) -> None:
    with forced("portable"):
        monkeypatch.setattr(cpu, "PIECE", 5 * 96)
        require_right(grid, (33, 96), FEW + 3, torch.float32, True)


@every_isa
@pytest.mark.parametrize("grid", [Codebook(), Codebook("nf4", 512), Int8Rows()], ids=str)
@pytest.mark.parametrize("count", [1, FEW + 1])
def test_an_order_and_gradients(isa: str, grid: Grid, count: int) -> None:
    with forced(isa):
        q = Nearest().quantize(make_weight((40, 96), torch.float16, "normal"), grid)
        order = torch.randperm(96, generator=torch.Generator().manual_seed(0)).int()
        q = QuantizedTensor(q.codes, q.grid, q.params, order, q.dtype)
        w = q.dequantize(torch.float64)
        x = torch.randn(count, 96, generator=torch.Generator().manual_seed(1), requires_grad=True)
        state = Cpu().pack(q)
        assert Cpu().unpack(state, grid, q.shape, q.dtype).equals(q)
        y = Cpu().linear(x, state, grid, q.shape, None)
        require_close(y.detach(), x.detach(), w, None)
        y.sum().backward()
        assert x.grad is not None and torch.allclose(x.grad.double(), w.sum(0).expand(count, -1), atol=1e-4)


def test_no_rows_give_no_rows() -> None:
    with forced("portable"):
        require_right(Codebook(), (8, 64), 0, torch.float32, True)


def test_reasons() -> None:
    with forced("off"):
        assert Cpu().refuse(Codebook(), (8, 64), CPU) == "switched off by NEOQUANT_ISA=off"
        assert (
            Cpu().refuse(Codebook(), (8, 64), torch.device("cuda")) == "the native library runs on the CPU, not on cuda"
        )


def test_a_layer_that_moves_where_its_kernel_cannot_follow_takes_another(monkeypatch: pytest.MonkeyPatch) -> None:
    with forced("portable"):
        q = Nearest().quantize(make_weight((40, 96), torch.float16, "normal"), Int8Rows())
        layer = QuantLinear(q, torch.ones(40))
        assert layer.kernel.name == "cpu"
    with forced("off"):  # as on a device that the library does not run on
        layer.to("cpu")
        assert layer.kernel.name == "reference"
        assert layer.quantized.equals(q)
        x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1))
        require_close(layer(x).detach(), x, q.dequantize(torch.float64), torch.ones(40))
