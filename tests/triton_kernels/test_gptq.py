"""A block of columns that one program rounds is, to the bit, what the loop over columns and rows makes of it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's interpreter is off: make test-triton", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: make test-triton")

from simulated_cuda.device import Counts
from switch import forced

from neoquant.grids import Affine, Codebook, Columns, Grid, Int8Rows, Mxfp4
from neoquant.quantizers import Gptq, Hessian, feedback
from neoquant.quantizers.feedback import Refit, round_columns
from neoquant.quantizers.hessian import OutputFactor
from neoquant.triton import running

GRIDS: list[Grid] = [
    Affine(2, 16), Affine(4, -1), Affine(8, 16, True), Affine(3, 16, float_zero=True), Codebook("nf4", 32, False),
    Codebook("fp4", 32, True), Mxfp4(), Int8Rows(),
]  # fmt: skip
COUPLED: list[tuple[Grid, int, int]] = [
    (Affine(3, 16), 2, 5), (Affine(4, -1, True), 1, 9), (Codebook("nf4", 32, True), 2, 5), (Mxfp4(), 3, 2),
    (Int8Rows(), 2, 4),
]  # fmt: skip
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
BLOCK = 20  # the interpreter takes a while for 128


def made(shape: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight[O, I], a factor[I, I] of correlated inputs, and an order of them."""
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=draw) * torch.rand(shape[0], 1, generator=draw)
    w[-1] = 0
    x = torch.randn(3 * shape[1], shape[1], generator=draw) @ torch.randn(shape[1], shape[1], generator=draw)
    hessian = Hessian(shape[1])
    hessian.add(x)
    return w, hessian.factor(True, 0.01).upper, hessian.order()


def factor_of(heads: int, size: int) -> OutputFactor:
    K = torch.randn(heads, size, 2 * size, generator=torch.Generator().manual_seed(size))
    return OutputFactor.of(K @ K.mT, 0.01)


@pytest.fixture
def in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop in torch, each product and difference rounded on its own: `addr_` rounds both at once on some CPUs."""

    def round_block(
        weights: Tensor, upper: Tensor, columns: Columns, order: Tensor, heads: Any, codes: Tensor
    ) -> Tensor:
        errors = torch.empty_like(weights)
        for i, column in enumerate(order.tolist()):
            if heads is None:
                codes[column], values = columns.round(column, weights[i])
            else:
                values, more = feedback._round_heads(weights[i], heads[0], heads[1][i], columns, column, codes[column])
                weights[i] += more
            errors[i] = (weights[i] - values) / upper[i, i]
            for later in range(i + 1, len(weights)):
                weights[later] -= upper[i, later] * errors[i]
        return errors

    monkeypatch.setattr(feedback, "_round_block", round_block)


def both_ways(
    w: Tensor, upper: Tensor, order: Tensor, grid: Grid, refit: Refit | None, factor: OutputFactor | None
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Codes and parameters by the loop in torch on the CPU, then on the simulated device by the program."""
    for place in (torch.device("cpu"), torch.device("cuda")):
        columns = grid.columns({name: param.to(place) for name, param in grid.fit(w).items()}, (len(w), w.shape[1]))
        sequence = (order if refit is None else torch.arange(w.shape[1])).to(place)
        there, of_rows = w.to(place).T[sequence], None if factor is None else factor.to(place)
        with forced("off"):
            assert (feedback.whole_block(there, columns) is None) == (place.type == "cpu")
            codes = round_columns(there, upper.to(place), columns, sequence, refit, of_rows, BLOCK)
        yield codes.cpu(), {name: param.cpu() for name, param in columns.params.items()}


def assert_alike(ways: Iterator[tuple[Tensor, dict[str, Tensor]]]) -> None:
    (codes, params), (found, fitted) = ways
    assert torch.equal(found, codes)
    assert all(torch.equal(fitted[name], param) for name, param in params.items())


@every_grid
def test_codes_are_those_of_the_loop(grid: Grid, in_order: None, gpu: Counts) -> None:
    """Of several blocks, programs and groups."""
    assert_alike(both_ways(*made((33, 32)), grid, None, None))


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("grid", [Affine(4, 16), Codebook("nf4", 32, False), Mxfp4()], ids=str)
def test_groups_may_be_fitted_on_the_way(grid: Grid, search: bool, in_order: None, gpu: Counts) -> None:
    assert_alike(both_ways(*made((5, 64)), grid, Refit(search, None), None))


@pytest.mark.parametrize(("grid", "heads", "size"), COUPLED, ids=str)
def test_codes_of_coupled_rows_are_too(grid: Grid, heads: int, size: int, in_order: None, gpu: Counts) -> None:
    assert_alike(both_ways(*made((heads * size, 32)), grid, None, factor_of(heads, size)))


@pytest.mark.parametrize("grid", [Affine(3, 16)], ids=str)
def test_many_coupled_rows_are_rounded_some_at_a_time(grid: Grid, gpu: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    (expected, _), _ = both_ways(*made((12, 32)), grid, None, factor_of(1, 12))
    monkeypatch.setattr(feedback, "TALL", 8)
    monkeypatch.setattr(feedback, "ROWS", 5)
    *_, (found, _) = both_ways(*made((12, 32)), grid, None, factor_of(1, 12))
    assert (found != expected).float().mean() < 3e-3  # a value within 1e-6 of the middle may go either way


@pytest.mark.parametrize("case", range(6))
def test_ragged_and_tiny_shapes(case: int, in_order: None, gpu: Counts) -> None:
    draw = random.Random(case)
    heads, size = draw.randint(0, 3), draw.randint(1, 6)
    shape = (heads * size or draw.randint(1, 40), draw.randint(1, 20))
    grid = draw.choice([grid for grid in GRIDS if not isinstance(grid, Codebook)])
    assert_alike(both_ways(*made(shape, case), grid, None, factor_of(heads, size) if heads else None))


@pytest.mark.parametrize("objective", ["layer", "attention", "model"])
def test_a_layer_on_a_gpu_never_leaves_it(objective: str, gpu: Counts) -> None:
    w, upper, _ = made((12, 32))
    results = []
    for place in ("cpu", "cuda"):
        hessian = Hessian(32, torch.device(place))
        hessian.add(upper.to(place))
        K = torch.stack([torch.eye(4) + 0.2] * 3).to(place)
        results.append(Gptq(objective=objective).quantize(w.to(place), Affine(4, 16), hessian, K).to("cpu"))
    assert (results[0].codes != results[1].codes).sum() <= 1
    assert any(line.startswith("triton/gptq") for line in gpu.launches)


@pytest.fixture
def rounds_to_zero(gpu: Counts, monkeypatch: pytest.MonkeyPatch) -> Counts:
    """Programs that count as a launch, and are not interpreted."""

    def run(program: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, Any]) -> None:
        arguments["codes"].zero_()
        arguments["errors"].memory.zero_()

    monkeypatch.setattr(running, "run", run)
    return gpu


@pytest.mark.parametrize("heads", [0, 4])
def test_a_block_of_128_columns_is_two_launches(heads: int, rounds_to_zero: Counts) -> None:
    """However many rows there are: the program, and the correction of later columns."""
    factor, grid = factor_of(heads, 8).to(torch.device("cuda")) if heads else None, Affine(4, 64)
    totals = []
    for count in (256, 512):
        w, order = torch.randn(32, count), torch.arange(count, device="cuda")
        columns = grid.columns({name: param.cuda() for name, param in grid.fit(w).items()}, (32, count))
        there = w.T.cuda()
        rounds_to_zero.reset()
        round_columns(there, torch.eye(count, device="cuda"), columns, order, None, factor)
        totals.append(rounds_to_zero.totals())
    assert [more - fewer for fewer, more in zip(*totals, strict=True)] == [2 * 2, 0, 0]
    assert totals[0][0] <= 10 and totals[0][1:] == (0, 0)


@pytest.mark.parametrize("heads", [0, 4])
@pytest.mark.parametrize("grid", [Affine(4, 64), Codebook(), Int8Rows()], ids=str)
def test_what_a_layer_costs(grid: Grid, heads: int, rounds_to_zero: Counts) -> None:
    """A ratchet, like those of tests/simulated_cuda: lower a bound, never raise one."""
    totals = []
    for count in (256, 1024):
        w, hessian = torch.randn(32, count, device="cuda"), Hessian(count, torch.device("cuda"))
        hessian.add(torch.randn(64, count).cuda())
        K = torch.eye(8).repeat(heads, 1, 1).cuda() if heads else None
        for _ in range(2):  # tables are made once
            hessian._factors.clear()
            rounds_to_zero.reset()
            Gptq().quantize(w, grid, hessian, K)
        totals.append(rounds_to_zero.totals())
    assert totals[0][1:] == totals[1][1:] and totals[0][1] <= 13 and totals[0][2] <= 2
    assert totals[1][0] <= 251
