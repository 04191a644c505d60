"""GPTQ: equal to its definition, to rounding where nothing is correlated, and better where something is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from weights import make_weight

from neoquant.errors import FormatError, RequestError
from neoquant.grids import Affine, Codebook, Columns, Grid, Int8Rows
from neoquant.quantizers import Gptq, Hessian, feedback, gptq
from neoquant.quantizers import hessian as hessians
from neoquant.quantizers.feedback import Refit, round_columns
from neoquant.quantizers.gptq import ORDERS, SCALES
from neoquant.quantizers.hessian import OutputFactor, inverse_factor
from neoquant.tensor import QuantizedTensor

GRIDS = [
    *(Affine(bits, 32, symmetric) for bits in (2, 3, 4) for symmetric in (False, True)),
    *(Affine(4, -1), Affine(8, 128), Affine(3, 32, float_zero=True)),
    *(Codebook(kind, 32, double) for kind in ("nf4", "fp4") for double in (False, True)),
    Int8Rows(),
]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
every_order = pytest.mark.parametrize("order", ORDERS)


def correlated(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Inputs as layers see them: a few directions carry most, and inputs differ in size."""
    random = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, columns // 4 + 1, generator=random) @ torch.randn(
        columns // 4 + 1, columns, generator=random
    )
    return (mixed + 0.3 * torch.randn(rows, columns, generator=random)) * torch.rand(columns, generator=random).exp()


def seen(x: Tensor) -> Hessian:
    hessian = Hessian(x.shape[-1])
    hessian.add(x)
    return hessian


def without_library(patch: pytest.MonkeyPatch) -> None:
    for module in (gptq, feedback):
        patch.setattr(module, "whole_block", lambda *given: None)


def output_error(q: QuantizedTensor, w: Tensor, x: Tensor) -> float:
    return float(((q.dequantize(torch.float32) - w.float()) @ x.T).square().sum())


def rounded(w: Tensor, grid: Grid, chosen: Gptq, hessian: Hessian) -> QuantizedTensor:
    """To nearest, with the parameters that the quantizer would fit beforehand."""
    importance = hessian.diagonal if chosen.scales == "weighted" else None
    params = grid.fit(w.float(), chosen.scales != "range", importance)
    return QuantizedTensor(grid.round(w, params), grid, params, dtype=w.dtype)


def one_by_one(w: Tensor, H: Tensor, grid: Grid, refit: Refit | None) -> Tensor:
    """GPTQ from its definition, in double precision: after each column the inverse Hessian loses a row and a column."""
    w, columns = w.double().clone(), grid.columns(grid.fit(w), (w.shape[0], w.shape[1]))
    codes = torch.empty(w.shape, dtype=torch.uint8)
    inverse = torch.linalg.inv(H.double())
    for j in range(w.shape[1]):
        if refit is not None and columns.width is not None and j % columns.width == 0:
            columns.refit(j, w[:, j : j + columns.width], refit.search, refit.importance)
        codes[:, j], values = columns.round(j, w[:, j])
        error = (w[:, j] - values) / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0]
        inverse = (inverse - inverse[:, :1] * inverse[:1] / inverse[0, 0])[1:, 1:]
    return codes


@every_grid
@pytest.mark.parametrize("refit", [None, Refit(False, None), Refit(True, None)], ids=["before", "range", "search"])
def test_blocks_change_nothing(grid: Grid, refit: Refit | None) -> None:
    w = make_weight((24, 150), torch.float32, "normal")
    H = seen(correlated(400, 150)).matrix.double()
    H.diagonal().add_(0.01 * H.diagonal().mean())
    upper = inverse_factor(H.flip(0, 1))
    assert upper is not None
    expected = one_by_one(w, H, grid, refit)
    for block in (1, 7, 32, 128, 1000):
        columns = grid.columns(grid.fit(w), (24, 150))
        found = round_columns(w.T.double(), upper, columns, torch.arange(150), refit, block=block)
        # a value within 1e-12 of the middle between two codes may go either way
        assert (found != expected).float().mean() < 2e-3, block


@every_grid
@every_order
@pytest.mark.parametrize("shape", [(24, 96), (5, 150), (1, 1)], ids=str)
def test_nothing_correlated_is_rounding_to_nearest(grid: Grid, order: str, shape: tuple[int, int]) -> None:
    w = make_weight(shape, torch.float16, "normal")
    x = torch.eye(shape[1])
    chosen = Gptq(order=order)
    q = chosen.quantize(w, grid, seen(x))
    expected = rounded(w, grid, chosen, seen(x))
    assert torch.equal(q.codes, expected.codes)
    assert all(torch.equal(q.params[name], expected.params[name]) for name in q.params)


@every_grid
@pytest.mark.parametrize(
    ("order", "scales"), [*(("static", scales) for scales in SCALES), ("off", "weighted"), ("dynamic", "range")]
)
def test_better_than_nearest_where_inputs_are_correlated(grid: Grid, order: str, scales: str) -> None:
    w, x = make_weight((48, 128), torch.float16, "normal"), correlated(600, 128)
    chosen, hessian = Gptq(order=order, scales=scales), seen(x)
    q, report = chosen.quantize_with_report(w, grid, hessian)
    nearest = rounded(w, grid, chosen, hessian)
    limit = 0.9 if grid.bits < 8 else 1.0
    assert output_error(q, w, x) < limit * output_error(nearest, w, x)
    assert report.error < limit * report.error_nearest
    total = (w.float() @ x.T).square().sum()
    assert report.error == pytest.approx(output_error(q, w, x) / float(total), rel=1e-2)


@every_order
def test_orders_are_undone_exactly(order: str) -> None:
    w, x = make_weight((24, 96), torch.float16, "normal"), correlated(400, 96)
    turned = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    for grid in (Affine(4, -1), Int8Rows()):
        q = Gptq(order=order).quantize(w, grid, seen(x))
        assert (q.order is not None) == (order == "dynamic")
        if order != "off":  # a row's parameters are the whole row's: shuffled inputs, shuffled result
            again = Gptq(order=order).quantize(w[:, turned], grid, seen(x[:, turned]))
            different = (q.dequantize()[:, turned] != again.dequantize()).float().mean()
            assert different < 0.01


def test_hessian_against_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessians, "STRIP", 7)
    x = correlated(90, 24).view(3, 30, 24)
    hessian = Hessian(24)
    for piece in x:
        hessian.add(piece)
    rows = x.view(-1, 24).double()
    expected = sum(2 / 90 * torch.outer(row, row) for row in rows)
    assert torch.allclose(hessian.matrix.double(), torch.as_tensor(expected), rtol=1e-4, atol=1e-4)
    assert torch.equal(hessian.matrix, hessian.matrix.T) and torch.equal(hessian.diagonal, hessian.matrix.diagonal())


@settings(deadline=None, max_examples=30)
@given(columns=st.integers(1, 40) | st.sampled_from([256, 257, 600, 1300]), seed=st.integers(0, 99))
def test_factor_is_the_inverse(columns: int, seed: int) -> None:
    H = seen(correlated(80, columns, seed)).matrix.double()
    H.diagonal().add_(0.01 * H.diagonal().mean())
    upper = inverse_factor(H.flip(0, 1))
    assert upper is not None and torch.equal(upper, upper.triu())
    assert torch.allclose(upper.T @ upper @ H, torch.eye(columns, dtype=torch.float64), atol=1e-8)


def test_shared_inputs_share_a_factor() -> None:
    hessian = seen(correlated(50, 24))
    assert hessian.factor(True, 0.01) is hessian.factor(True, 0.01)
    kept = hessian.factor(True, 0.01)
    hessian.add(torch.ones(1, 24))
    assert hessian.factor(True, 0.01) is not kept


def test_damping_is_raised_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    x = correlated(200, 32)
    real, calls = inverse_factor, []

    def stubborn(H: Tensor) -> Tensor | None:
        calls.append(H.dtype)
        return real(H) if len(calls) > 3 else None

    monkeypatch.setattr(hessians, "inverse_factor", stubborn)
    _, report = Gptq().quantize_with_report(make_weight((8, 32), torch.float32, "normal"), Affine(4, 32), seen(x))
    assert calls == [torch.float32, torch.float64, torch.float32, torch.float64]
    assert report.damping == pytest.approx(0.1) and report.double
    monkeypatch.setattr(hessians, "inverse_factor", lambda H: None)
    with pytest.raises(RequestError, match="not positive definite, even with damping 10"):
        seen(x).factor(True, 0.01)


@every_order
def test_dead_inputs_are_rounded_to_nearest(order: str) -> None:
    w, x = make_weight((16, 64), torch.float32, "normal"), correlated(300, 64)
    x[:, 10:20] = 0
    grid = Affine(4, -1)
    q, report = Gptq(order=order, scales="range").quantize_with_report(w, grid, seen(x))
    assert report.dead == 10 and report.remarks == ["10 inputs were always zero"]
    error = (q.dequantize(torch.float32) - w)[:, 10:20].abs().amax(1)
    assert (error <= 0.51 * q.params["scale"][:, 0].float()).all()
    nothing = Gptq(order=order).quantize(w, grid, seen(torch.zeros(3, 64)))
    assert torch.equal(nothing.dequantize(), rounded(w, grid, Gptq(), seen(torch.zeros(3, 64))).dequantize())


def test_what_cannot_be_is_refused() -> None:
    w = make_weight((8, 32), torch.float32, "normal")
    for nothing in (None, Hessian(32), seen(torch.ones(2, 31))):
        with pytest.raises(RequestError, match="needs the layer's inputs"):
            Gptq().quantize(w, Affine(), nothing)
    with pytest.raises(FormatError, match="inputs hold infinity or NaN"):
        seen(torch.full((2, 8), torch.nan))
    with pytest.raises(FormatError, match="has 8 inputs, got 9"):
        Hessian(8).add(torch.ones(2, 9))
    with pytest.raises(RequestError, match="activation order 'on': legal are static, off, dynamic"):
        Gptq(order="on")
    with pytest.raises(RequestError, match="scales 'best': legal are range, mse, weighted"):
        Gptq(scales="best")
    with pytest.raises(RequestError, match="damping 0: legal"):
        seen(torch.ones(2, 8)).factor(True, 0)


def output_hessians(heads: int, size: int, seed: int = 0) -> Tensor:
    """Output Hessians of heads in which a few directions count, and rows count differently."""
    return torch.stack([seen(correlated(3 * size, size, seed + head)).matrix for head in range(heads)])


def kronecker(w: Tensor, hessian: Hessian, K: Tensor, columns: Columns, output_damping: float = 0.01) -> Tensor:
    """Two-sided compensation by its definition: GPTQ of each head's flattened weight, one number after the other, for
    the Kronecker product of both Hessians, in double precision."""
    upper, sequence = hessian.factor(True, 0.01).upper.double(), hessian.order()
    factor = OutputFactor.of(K, output_damping)
    codes = torch.empty(w.shape, dtype=torch.uint8)
    for head, row_order in enumerate(factor.row_order):
        rows = row_order + head * len(row_order)
        flat = w[rows][:, sequence].double().T.reshape(-1)  # rows of a column, then the next column
        both = torch.kron(upper.contiguous(), factor.unit[head].double().contiguous())
        for at in range(len(flat)):
            column, row = int(sequence[at // len(rows)]), rows[at % len(rows), None]
            codes[row, column], value = columns.round(column, flat[at : at + 1], row)
            flat[at + 1 :] -= both[at, at + 1 :] * (flat[at] - value) / both[at, at]
    return codes


@pytest.mark.parametrize("grid", [*GRIDS, Codebook("nf4", 64)], ids=str)
def test_heads_as_a_kronecker_product(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    w, hessian, K = make_weight((12, 96), torch.float32, "normal"), seen(correlated(300, 96)), output_hessians(3, 4)
    expected = kronecker(w, hessian, K, grid.columns(grid.fit(w), (12, 96)))
    found = Gptq().quantize(w, grid, hessian, K)
    assert (found.codes != expected).float().mean() < 2e-3  # a value within 1e-6 of the middle may go either way
    without_library(monkeypatch)
    plain = Gptq().quantize(w, grid, hessian, K)
    assert (plain.codes != found.codes).float().mean() < 2e-3


@pytest.mark.parametrize(
    "grid", [Affine(3, 32), Affine(4, 32, float_zero=True), Affine(4, -1, True), Codebook("nf4", 32, False)], ids=str
)
@pytest.mark.parametrize(("tall", "rows"), [(4, 3), (11, 4)])
def test_many_rows_as_a_kronecker_product(grid: Grid, tall: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are gathered before later ones are corrected give what correcting one by one gives."""
    monkeypatch.setattr(feedback, "TALL", tall)
    monkeypatch.setattr(feedback, "ROWS", rows)
    w, hessian, K = make_weight((12, 96), torch.float32, "normal"), seen(correlated(300, 96)), output_hessians(1, 12)
    expected = kronecker(w, hessian, K, grid.columns(grid.fit(w), (12, 96)), 0.01 * gptq.GRADIENT_DAMPING)
    found = Gptq(objective="model").quantize(w, grid, hessian, K)
    assert (found.codes != expected).float().mean() < 2e-3  # a value within 1e-6 of the middle may go either way


@settings(deadline=None, max_examples=30)
@given(heads=st.integers(0, 3), size=st.integers(1, 9), inputs=st.integers(1, 12), every=st.integers(1, 12))
def test_errors_are_reported_of_some_rows_of_each_head(heads: int, size: int, inputs: int, every: int) -> None:
    random = torch.Generator().manual_seed(size)
    w = torch.randn(max(1, heads) * size, inputs, generator=random)
    H = correlated(50, inputs).T @ correlated(50, inputs)
    K = output_hessians(heads, size) if heads else None
    whole = torch.eye(len(w)) if K is None else torch.block_diag(*K)
    terms = (whole.double() @ w.double() @ H.double() @ w.T.double()).diagonal().view(-1, size)
    found = gptq._output_norm(w, H, K, every)
    assert found == pytest.approx(float(terms[:, ::every].sum()), rel=1e-4, abs=1e-4 * float(terms.abs().sum()))


@every_grid
@every_order
def test_identity_moments_are_the_layers_own_objective(grid: Grid, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "TALL", 16)
    monkeypatch.setattr(feedback, "ROWS", 10)
    w, hessian = make_weight((24, 150), torch.float32, "normal"), seen(correlated(300, 150))
    alone = Gptq(order, objective="layer").quantize(w, grid, hessian)
    found = Gptq(order, objective="model").quantize(w, grid, hessian, torch.eye(24)[None])
    assert torch.equal(found.codes, alone.codes)
    assert all(torch.equal(found.params[name], param) for name, param in alone.params.items())


@settings(deadline=None, max_examples=30)
@given(heads=st.integers(1, 3), pieces=st.integers(1, 9), size=st.integers(1, 5), seed=st.integers(0, 99))
def test_diagonal_pieces_are_blocks_of_the_diagonal(heads: int, pieces: int, size: int, seed: int) -> None:
    K = output_hessians(heads, pieces * size, seed)
    found = hessians.diagonal_pieces(K, size)
    if pieces <= 4:
        assert found is K
    else:
        expected = [each[i : i + size, i : i + size] for each in K for i in range(0, pieces * size, size)]
        assert torch.equal(found, torch.stack(expected))
    assert hessians.diagonal_pieces(torch.ones(1, 5 * size + 1, 5 * size + 1), 2 * size + 2).shape[1] == 5 * size + 1


@every_grid
@pytest.mark.parametrize("shape", [(24, 96), (5, 150), (1, 1), (65, 130)], ids=str)
def test_native_is_torch(grid: Grid, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    w, hessian = make_weight(shape, torch.float32, "normal"), seen(correlated(200, shape[1]))
    for order in ORDERS:
        found = Gptq(order=order).quantize(w, grid, hessian)
        with monkeypatch.context() as patch:
            without_library(patch)
            plain = Gptq(order=order).quantize(w, grid, hessian)
        assert (plain.codes != found.codes).float().mean() < 5e-3


@every_grid
def test_better_for_heads_than_without_them(grid: Grid) -> None:
    w, hessian, K = make_weight((64, 96), torch.float32, "normal"), seen(correlated(400, 96)), output_hessians(4, 16)

    def error(q: QuantizedTensor) -> float:
        D = (q.dequantize(torch.float32) - w).view(4, 16, 96).double()
        return float((K.double() @ D @ hessian.matrix.double()).mul_(D).sum())

    q, report = Gptq().quantize_with_report(w, grid, hessian, K)
    alone, plain = Gptq(objective="layer").quantize_with_report(w, grid, hessian, K)
    assert error(q) < 0.9 * error(alone)
    assert (report.objective, plain.objective) == ("attention", "layer")
    assert report.error / report.error_nearest == pytest.approx(
        error(q) / error(rounded(w, grid, Gptq(), hessian)), rel=1e-3
    )
    assert torch.equal(alone.codes, Gptq().quantize(w, grid, hessian).codes)


def test_heads_that_do_not_count_are_rounded_as_if_alone() -> None:
    w, hessian, K = make_weight((8, 32), torch.float32, "normal"), seen(correlated(99, 32)), torch.zeros(2, 4, 4)
    assert torch.equal(
        Gptq().quantize(w, Affine(4, 32), hessian, K).codes, Gptq().quantize(w, Affine(4, 32), hessian).codes
    )
    with pytest.raises(RequestError, match=r"output Hessian \[2, 3, 3\] is not that of 8 rows"):
        Gptq().quantize(w, Affine(4, 32), hessian, torch.ones(2, 3, 3))
    with pytest.raises(RequestError, match="objective 'best': legal are attention, layer, model"):
        Gptq(objective="best")
