"""The native library's products: every instruction set, thread count, shape and number of rows, against the values."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from switch import every_isa, forced
from torch import Tensor
from weights import affine_grids, codebooks, make_weight

from neoquant import native
from neoquant.grids import Affine, Codebook, Grid, Int8Rows
from neoquant.kernels import Cpu, cpu
from neoquant.kernels.native_weight import native_weight
from neoquant.native import products
from neoquant.nn.linear import QuantLinear
from neoquant.quantizers import Nearest
from neoquant.tensor import QuantizedTensor

CPU = torch.device("cpu")
FEW, MANY, TILED = 1, 9, 50  # rows of activations between which the library takes another way
grids = st.one_of(codebooks, affine_grids, st.just(Int8Rows()))
SOME = [
    Codebook(),
    Codebook("nf4", 512, False),
    Int8Rows(),
    Affine(2, 16),
    Affine(3, -1, True),
    Affine(4, 64),
    Affine(3, 32, float_zero=True),
    Affine(8),
]
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
    grid=grids, rows=st.integers(1, 70), columns=columns,
    count=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 11, 16, 30, 33, 49]),
    threads=st.sampled_from([1, 2, 4]), biased=st.booleans(),
)  # fmt: skip
def test_products_are_right(
    isa: str, grid: Grid, rows: int, columns: int, count: int, threads: int, biased: bool
) -> None:
    with forced(isa, threads):
        require_right(grid, (rows, columns), count, torch.float32, biased)


@pytest.mark.isa("avx2")
@pytest.mark.parametrize("fast", [0, 1], ids=["permutes", "shuffles"])
@settings(deadline=None, max_examples=30)
@given(grid=codebooks, rows=st.integers(1, 30), columns=columns, count=st.integers(1, 4))
def test_both_ways_to_look_up_are_right(fast: int, grid: Grid, rows: int, columns: int, count: int) -> None:
    with forced("avx2"):
        switch = ctypes.c_int.in_dll(native.active().library, "nq_shuffles_are_fast")
        before, switch.value = switch.value, fast
        try:
            require_right(grid, (rows, columns), count, torch.float32, False)
        finally:
            switch.value = before


@pytest.mark.isa("avx2")
@pytest.mark.parametrize("grid", [Affine(2, 16), Affine(3, 64), Affine(4, 64), Affine(4, 32, True)], ids=str)
def test_codes_near_the_middle_keep_their_accuracy(grid: Grid) -> None:
    """AVX2 counts codes from 0, not from the middle: what that adds to a sum is far more than what is left here."""
    w = torch.zeros(24, 256)
    w[:, ::64] = torch.linspace(-1, 1, 96).view(24, 4)
    with forced("avx2"):
        q = Nearest().quantize(w, grid)
        for count in (1, 2, 3, 4):
            x = torch.randn(count, 256, generator=torch.Generator().manual_seed(count)) + 100
            y = Cpu().linear(x, Cpu().pack(q), grid, (24, 256), None)
            require_close(y, x, q.dequantize(torch.float64), None)


@every_isa
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("grid", SOME, ids=str)
def test_other_types_are_computed_in_themselves(isa: str, grid: Grid, dtype: torch.dtype) -> None:
    with forced(isa):
        for count in (FEW, MANY, TILED):
            require_right(grid, (24, 96), count, dtype, True)


@every_isa
@settings(deadline=None, max_examples=30)
@given(grid=grids, rows=st.integers(1, 9), columns=columns, threads=st.sampled_from([1, 2]))
def test_decoding_gives_the_grid_s_values(isa: str, grid: Grid, rows: int, columns: int, threads: int) -> None:
    with forced(isa, threads):
        q = Nearest().quantize(make_weight((rows, columns), torch.float32, "normal"), grid)
        w, state = torch.full((rows, columns), torch.nan), Cpu().pack(q)
        for start, piece in cpu._pieces(native_weight(state, grid, q.shape), torch.float32):
            w[start : start + len(piece)] = piece
        assert torch.equal(w, q.dequantize(torch.float32))


@pytest.mark.parametrize("grid", [Codebook(), Int8Rows()], ids=str)
def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch, grid: Grid) -> None:
    with forced("portable"):
        monkeypatch.setattr(cpu, "PIECE", 5 * 96)
        require_right(grid, (33, 96), MANY + 2, torch.float32, True)


@every_isa
@pytest.mark.parametrize("grid", SOME, ids=str)
@pytest.mark.parametrize("count", [FEW, MANY, TILED])
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


@every_isa
@pytest.mark.parametrize("grid", SOME, ids=str)
def test_more_than_fits_at_once(isa: str, grid: Grid) -> None:
    """More rows of activations than are laid out together, more columns than a block is deep, a ragged end of each."""
    with forced(isa, 2):
        require_right(grid, (35, 1160), 487, torch.float32, True)
        require_right(grid, (131, 96), 25, torch.float32, True)


@every_isa
@pytest.mark.parametrize("grid", SOME, ids=str)
@pytest.mark.parametrize("columns", [88, 96])
def test_nothing_behind_a_tensor_is_read(isa: str, grid: Grid, columns: int) -> None:
    """Weights that end where readable memory does."""
    q = Nearest().quantize(make_weight((3, columns), torch.float16, "normal"), grid)
    x = torch.randn(TILED, columns, generator=torch.Generator().manual_seed(1))
    with forced(isa):
        state = {name: at_the_end_of_a_page(tensor) for name, tensor in Cpu().pack(q).items()}
        for count in (FEW, MANY, TILED):
            inputs = at_the_end_of_a_page(x[:count])
            require_close(Cpu().linear(inputs, state, grid, q.shape, None), inputs, q.dequantize(torch.float64), None)


@every_isa
@pytest.mark.parametrize("grid", SOME, ids=str)
@pytest.mark.parametrize("count", [FEW, MANY, TILED])
def test_what_is_not_finite_stays_so(isa: str, grid: Grid, count: int) -> None:
    q = Nearest().quantize(make_weight((40, 96), torch.float16, "normal"), grid)
    half = float(torch.tensor([0x7FFF], dtype=torch.int16).view(torch.float16).float())  # NaN whose digits are all ones
    for bad in (torch.nan, half, -half, torch.inf, -torch.inf):
        x = torch.randn(count, 96, generator=torch.Generator().manual_seed(1))
        x[0, 40] = bad
        with forced(isa):
            y = Cpu().linear(x, Cpu().pack(q), grid, q.shape, None)
        hit = q.dequantize(torch.float32)[:, 40] != 0
        assert not y[0, hit].isfinite().any() and y[1:].isfinite().all()


def at_the_end_of_a_page(tensor: Tensor) -> Tensor:
    """A copy of the tensor, behind which there is memory that may not be read."""
    size = -(tensor.nbytes // -mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + size), mmap.PAGESIZE, 0) == 0  # PROT_NONE
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=size - tensor.nbytes)
    return copy.copy_(tensor.reshape(-1)).view(tensor.shape)


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


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 70), columns=st.integers(1, 150) | st.sampled_from([512, 777, 1100]),
    count=st.integers(1, 13) | st.integers(48, 70), threads=st.sampled_from([1, 3]), biased=st.booleans(),
)  # fmt: skip
def test_plain_weights(
    isa: str, dtype: torch.dtype, rows: int, columns: int, count: int, threads: int, biased: bool
) -> None:
    weight, x = torch.randn(rows, columns).to(dtype), torch.randn(count, columns)
    bias = torch.randn(rows) if biased else None
    with forced(isa, threads):
        w = products.plain(weight)
        require_close(products.multiply(x, w, bias), x, weight.double(), None if bias is None else bias.double())
        chosen = torch.randint(0, rows, (5,))
        assert torch.equal(products.decode_rows(w, chosen), weight[chosen].float())


@every_isa
def test_every_half_is_itself(isa: str) -> None:
    """Subnormals, infinities and NaN included, in vectors and alone."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = bits.view(dtype)
        with forced(isa, 1):
            for columns in (1, 64):
                weight = values.view(-1, columns)
                decoded = products.decode_rows(products.plain(weight), torch.arange(len(weight)))
                assert torch.equal(decoded.nan_to_num(7), weight.float().nan_to_num(7))
            alone = products.multiply(torch.ones(1, 1), products.plain(values.view(-1, 1)), None)[0]
            many = products.multiply(torch.eye(64), products.plain(values.nan_to_num(0, 0, 0).view(-1, 64)), None)
        expected = values.float()
        if dtype == torch.bfloat16:  # multiplied by one, the smallest are what the processor makes of them
            expected = torch.where(expected.abs() < 1.2e-38, alone, expected)
        assert torch.equal(alone.nan_to_num(7), expected.nan_to_num(7))
        shown, finite = many.T.reshape(-1), values.nan_to_num(0, 0, 0).float()
        if isa == "amx":  # tiles take the smallest for zeros
            finite = torch.where(finite.abs() < torch.finfo(torch.float32).tiny, 0, finite)
        assert torch.equal(shown, finite)


@pytest.mark.parametrize("grid", SOME, ids=str)
def test_the_library_is_handed_no_address_of_a_tensor_without_values(grid: Grid) -> None:
    """On the device `meta` every tensor lies at address 0, which the library would read."""
    layer = QuantLinear(Nearest().quantize(make_weight((32, 64), torch.float16, "normal"), grid), torch.ones(32))
    ids, x = torch.tensor([[1, 2]]), torch.ones(2, 3, 64)
    assert layer(x.to("meta")).is_meta and layer.embedding(ids.to("meta"), torch.float32).shape == (1, 2, 64)
    layer.to("meta")
    assert layer(x.to("meta")).shape == (2, 3, 32)
    for grad in (False, True):
        with pytest.raises(RuntimeError, match="given a tensor on meta: weights and activations must be on one device"):
            layer(x.clone().requires_grad_(grad))
    with pytest.raises(RuntimeError, match="given a tensor on meta"):
        layer.embedding(ids, torch.float32)
