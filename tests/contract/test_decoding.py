"""What a grid states of itself, held against its own values, and what computes by that statement alone.

Runs over the tables, as test_tables.py does, and over a grid that nothing knows by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from weights import DTYPES, make_weight

from neoquant import native
from neoquant.grids import Affine, Codebook, Columns, Decoding, Grid, Params, ParamShapes, Scale, legal_pairs, make_grid
from neoquant.kernels import KERNELS, ROUNDING, Cpu, CpuInt8, Kernel, Reference, ReferenceInt8
from neoquant.kernels.rounded import round_activations, run_length
from neoquant.nn.linear import QuantLinear
from neoquant.quantizers import Nearest
from neoquant.tensor import QuantizedTensor

CPU = torch.device("cpu")
SHAPES = [(1, 1), (3, 5), (24, 24), (5, 160), (9, 129), (130, 64), (12, 1024)]
GRIDS = [make_grid(bits, name) for bits, name in legal_pairs()]
VARIANTS = [
    Affine(4, 16),
    Affine(3, -1, True),
    Affine(4, 16, float_zero=True),
    Affine(8, 64, float_zero=True),
    Codebook("fp4", 32, False),
]

every_grid = pytest.mark.parametrize(
    "grid", GRIDS + VARIANTS, ids=lambda grid: "-".join(map(str, grid.describe().values()))
)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
every_rounding = pytest.mark.parametrize("kernel", ROUNDING.values(), ids=lambda kernel: kernel.name)


@dataclass(frozen=True)
class Thirds(Grid):
    """Signed thirds in groups of 48, scales bfloat16: what no kernel but the reference's can run."""

    group: int = 48
    flat: bool = False

    bits: ClassVar[int] = 3
    legal_bits: ClassVar[tuple[int, ...]] = (3,)
    options: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        return "thirds"

    @property
    def decoding(self) -> Decoding:
        table = tuple(code / 3 - 1 for code in range(8))
        return Decoding(3, Scale("size", factor=0.5), self.group, self.flat, table=table, zero_code=3)

    def param_shapes(self, shape: tuple[int, ...]) -> ParamShapes:
        groups = -(-shape[0] * shape[1] // self.group) if self.flat else -(-shape[1] // self.group)
        return {"size": (torch.bfloat16, (groups,) if self.flat else (shape[0], groups))}

    def nearest(self, w: Tensor) -> tuple[Tensor, Params]:
        random = torch.Generator().manual_seed(0)
        (dtype, size) = self.param_shapes(tuple(w.shape))["size"]
        codes = torch.randint(0, 8, w.shape, dtype=torch.uint8, generator=random)
        return codes, {"size": torch.rand(size, generator=random).add(0.5).to(dtype)}

    def fit(self, w: Tensor, search: bool = False, importance: Tensor | None = None) -> Params:
        raise NotImplementedError

    def round(self, w: Tensor, params: Params) -> Tensor:
        raise NotImplementedError

    def columns(self, params: Params, shape: tuple[int, int]) -> Columns:
        raise NotImplementedError


def quantize(grid: Grid, shape: tuple[int, int]) -> QuantizedTensor:
    return Nearest().quantize(make_weight(shape, torch.float16, "normal"), grid)


def group_of(decoding: Decoding, shape: tuple[int, int]) -> Tensor:
    """The number of each weight's group, int64[O, I], one by one."""
    rows, columns = shape
    width = columns if decoding.group is None else decoding.group
    if decoding.flat:
        return torch.tensor([[(row * columns + column) // width for column in range(columns)] for row in range(rows)])
    of_row = -(-columns // width)
    return torch.tensor([[row * of_row + column // width for column in range(columns)] for row in range(rows)])


def places_one_by_one(decoding: Decoding, codes: Tensor) -> Tensor:
    """Where in the table each weight's number stands, int64[O, I]: on a trellis, by its ring of rows."""
    trellis = decoding.trellis
    if trellis is None:
        return codes.long()
    places = torch.empty(codes.shape, dtype=torch.int64)
    for row in range(len(codes)):
        first = row - row % trellis.span
        length = min(trellis.span, len(codes) - first)
        for column in range(codes.shape[1]):
            state = 0
            for back in range(trellis.state_bits // trellis.code_bits):
                code = int(codes[first + (row - first - back) % length, column])
                state += code << (trellis.code_bits * back)
            hashed = state * trellis.multiplier % 2**trellis.state_bits
            places[row, column] = hashed >> (trellis.state_bits - trellis.level_bits)
    return places


def scales_one_by_one(scale: Scale, params: Params) -> list[float]:
    found = []
    for number, stored in enumerate(params[scale.param].view(-1).tolist()):
        value = stored * scale.factor
        if scale.table is not None:
            value = scale.table[stored]
        if scale.nested is not None:
            coarse, offset = (params[name].view(-1) for name in scale.nested)
            value = value * coarse[number // 256].item() + offset.item()
        found.append(value)
    return found


@every_grid
@every_shape
def test_values_are_what_the_grid_states(grid: Grid, shape: tuple[int, int]) -> None:
    """In double precision, weight by weight; the grid computes in single."""
    q, decoding = quantize(grid, shape), grid.decoding
    groups, scales = group_of(decoding, shape), torch.tensor(scales_one_by_one(decoding.scale, q.params)).double()
    numbers = q.codes.view(torch.int8).double() if decoding.signed else q.codes.double()
    if decoding.table is not None:
        numbers = torch.tensor(decoding.table, dtype=torch.float64)[places_one_by_one(decoding, q.codes)]
        assert decoding.trellis is not None or decoding.table[decoding.zero_code] == 0
    zeros = torch.full((int(groups.max()) + 1,), float(decoding.middle), dtype=torch.float64)
    if decoding.zero is not None:
        zeros = q.params[decoding.zero].view(-1).double()
    expected = (numbers - zeros[groups]) * scales[groups]
    assert torch.allclose(q.dequantize(torch.float64), expected, rtol=3e-7, atol=0)
    rows = torch.tensor([shape[0] - 1, 0, 0])
    codes = q.codes[decoding.sources(rows, shape[0])]
    assert grid.decode_rows(codes, q.params, rows).equal(q.dequantize(torch.float32)[rows])


@every_grid
@every_shape
def test_a_run_of_activations_lies_in_one_group_of_every_row(grid: Grid, shape: tuple[int, int]) -> None:
    groups, run = group_of(grid.decoding, shape), run_length(grid, shape[1])
    assert all((piece == piece[:, :1]).all() for piece in groups.split(run, 1))


def runs(kernel: Kernel, grid: Grid, shape: tuple[int, int]) -> bool:
    return kernel.refuse(grid, shape, CPU, False) is None


@every_grid
@every_shape
@every_rounding
@pytest.mark.parametrize("has_order", [False, True], ids=["", "ordered"])
def test_rounding_kernels_multiply_what_they_rounded(
    grid: Grid, shape: tuple[int, int], kernel: Kernel, has_order: bool
) -> None:
    """Exactly the rounded activations with the grid's values, or these in whole steps; near the exact product."""
    if not runs(kernel, grid, shape):
        assert runs(ReferenceInt8(), grid, shape)
        return
    q = quantize(grid, shape)
    order = torch.arange(shape[1] - 1, -1, -1, dtype=torch.int32) if has_order else None
    q = QuantizedTensor(q.codes, grid, q.params, order, q.dtype)
    bias = make_weight((1, shape[0]), torch.float16, "normal", 3)[0]
    layer = QuantLinear(q, bias, kernel)
    used = grid.decoding.decode(q.codes, q.params, whole_steps=True).double()
    for dtype in DTYPES:
        for rows in ((), (1,), (2, 3)):
            x = torch.randn(*rows, shape[1], generator=torch.Generator().manual_seed(5)).to(dtype)
            y = layer(x)
            assert (y.shape, y.dtype) == ((*rows, shape[0]), dtype)
            fed = x if order is None else x[..., order.long()]
            rounded = round_activations(fed.float(), run_length(grid, shape[1])).double()
            length = rounded.norm(dim=-1, keepdim=True) * used.norm(dim=1) + bias.double().abs()
            bound = 4 * torch.finfo(dtype).eps * shape[1] ** 0.5 * length
            assert ((y.double() - (rounded @ used.T + bias.double())).abs() <= bound).all()
    exact = x.double() @ q.dequantize(torch.float64).T + bias.double()
    assert (y.double() - exact).norm() <= 0.02 * exact.norm() + 1e-3


@every_grid
@every_shape
@every_rounding
def test_rounding_kernels_keep_the_weight(grid: Grid, shape: tuple[int, int], kernel: Kernel) -> None:
    if not runs(kernel, grid, shape):
        assert runs(ReferenceInt8(), grid, shape)
        return
    q, ids = quantize(grid, shape), torch.tensor([[0, shape[0] - 1]])
    state = kernel.pack(q)
    assert kernel.unpack(state, grid, shape, q.dtype).equals(q)
    assert kernel.embedding(ids, state, grid, shape, torch.float32).equal(q.dequantize(torch.float32)[ids])


@pytest.mark.parametrize("grid", [Thirds(), Thirds(flat=True), Thirds(32)], ids=str)
def test_a_grid_that_no_kernel_was_written_for(grid: Grid) -> None:
    """The reference runs it by its statement; the native library and bitsandbytes say why they do not."""
    shape = (6, 160)
    q, x = quantize(grid, shape), torch.randn(5, 160, generator=torch.Generator().manual_seed(1))
    w = q.dequantize(torch.float64)
    assert torch.allclose(
        Reference().linear(x, Reference().pack(q), grid, shape, None).double(), x.double() @ w.T, atol=1e-4
    )
    test_a_run_of_activations_lies_in_one_group_of_every_row(grid, shape)
    test_values_are_what_the_grid_states(grid, shape)
    test_rounding_kernels_multiply_what_they_rounded(grid, shape, ReferenceInt8(), False)
    for kernel in (Cpu(), CpuInt8()):
        reason = kernel.refuse(grid, shape, CPU)
        if native.active().library is not None:
            assert reason == "the native library does not run thirds: codebooks have 16 values and no zeros"
        assert reason is not None
    assert "not thirds" in str(KERNELS["bitsandbytes"].refuse(grid, shape, CPU))
