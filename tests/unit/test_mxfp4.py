"""MXFP4: against its definition in exact arithmetic and torch's own e8m0, and from weights to a measured model."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from conftest import Cli
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from weights import make_weight, weights

import neoquant
from neoquant import native
from neoquant.errors import FormatError, RequestError
from neoquant.formats import FORMATS
from neoquant.grids import make_grid
from neoquant.grids.mxfp4 import E2M1, E8M0, Mxfp4, nearest_codes
from neoquant.kernels import Cpu, CpuInt8, Reference, ReferenceInt8
from neoquant.native import gptq
from neoquant.nn.linear import QuantLinear
from neoquant.quantizers import Gptq, Nearest
from neoquant.tensor import QuantizedTensor

GRID, CPU = Mxfp4(), torch.device("cpu")


def e2m1(code: int) -> Fraction:
    """By its fields: a sign, two bits of exponent (bias 1), one of mantissa, subnormal where the exponent is 0."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = Fraction(mantissa, 2) if exponent == 0 else (1 + Fraction(mantissa, 2)) * 2 ** (exponent - 1)
    return -size if sign else size


def nearest_by_search(value: Fraction) -> int:
    """Of the eight codes of its sign, the nearest: of two, that with an even mantissa."""
    codes = range(8, 16) if value < 0 else range(8)
    return min(codes, key=lambda code: (abs(e2m1(code) - value), code & 1))


def scale_by_rule(block: list[float]) -> int:
    """floor(log2(absmax)) - 2 as a biased byte, by trying every exponent."""
    absmax = max(abs(Fraction(value)) for value in block)
    fits = [exponent for exponent in range(-150, 129) if Fraction(2) ** exponent <= absmax]
    return min(max(fits[-1] - 2 + 127, 0), 254) if fits else 0


def by_definition(w: Tensor) -> tuple[list[list[int]], list[list[int]]]:
    codes, scales = [], []
    for row in w.float().tolist():
        blocks = [row[at : at + 32] for at in range(0, len(row), 32)]
        scales.append([scale_by_rule(block) for block in blocks])
        units = [Fraction(2) ** (scale - 127) for scale in scales[-1]]
        codes.append([nearest_by_search(Fraction(value) / units[at // 32]) for at, value in enumerate(row)])
    return codes, scales


def test_the_tables() -> None:
    assert list(E2M1) == [float(e2m1(code)) for code in range(16)]
    stored = torch.arange(256, dtype=torch.uint8)
    theirs = stored.view(torch.float8_e8m0fnu).float()
    assert torch.equal(torch.tensor(E8M0[:255]), theirs[:255]) and math.isnan(E8M0[255]) and theirs[255].isnan()


def test_ties_go_to_even_and_what_is_too_large_to_the_end() -> None:
    eighths = torch.arange(-80, 81) / 8
    expected = [nearest_by_search(Fraction(value)) for value in eighths.tolist()]
    assert nearest_codes(eighths).tolist() == expected
    beyond = torch.tensor([torch.inf, -torch.inf, 3e38, 1e-45, -1e-45, -0.0])
    assert nearest_codes(beyond).tolist() == [7, 15, 7, 0, 8, 0]


@settings(deadline=None, max_examples=40)
@given(w=weights(6, 100))
def test_nearest_is_the_specification_s(w: Tensor) -> None:
    w = w[:6, :100]
    codes, params = GRID.nearest(w)
    expected, scales = by_definition(w)
    assert params["scale"].tolist() == scales and codes.tolist() == expected
    assert torch.equal(GRID.round(w, params), codes)


@pytest.mark.parametrize("size", [2.0**-149, 5e-45, 2.0**-127, 2.0**-124, 1.1e-38, 1.0, 2.0**126, 3.4028234e38])
def test_scales_end_where_e8m0_and_float32_do(size: float) -> None:
    w = torch.tensor([[size, -size / 2, size / 3, 0.0, -size]])
    codes, params = GRID.nearest(w)
    assert (codes.tolist(), params["scale"].tolist()) == by_definition(w)
    values = GRID.decode(codes, params, torch.float64)
    assert values.isfinite().all() and (values - w.double()).abs().max() <= max(size / 3, 2.0**-129)
    found = GRID.fit(w, search=True)
    assert GRID.decode(GRID.round(w, found), found).isfinite().all()


def test_zeros_and_a_single_weight() -> None:
    codes, params = GRID.nearest(torch.zeros(3, 70))
    assert not codes.any() and params["scale"].tolist() == [[0, 0, 0]] * 3
    codes, params = GRID.nearest(torch.tensor([[-0.75]]))
    assert (codes.tolist(), params["scale"].tolist()) == ([[15]], [[124]])  # -6 times 2**-3
    assert GRID.decode(codes, params).item() == -0.75


def test_every_byte_decodes_as_it_is_defined() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(255, 2)
    params = {"scale": torch.arange(255, dtype=torch.uint8)[:, None]}
    expected = [[float(e2m1(code % 16)) * 2.0 ** (byte - 127) for code in range(32)] for byte in range(255)]
    exact = torch.tensor(expected, dtype=torch.float64)
    assert torch.equal(GRID.decode(codes, params), exact.float())
    with pytest.raises(FormatError, match="holds 255, which is NaN; legal are 0 to 254"):
        QuantizedTensor(codes[:1], GRID, {"scale": torch.tensor([[255]], dtype=torch.uint8)})


@settings(deadline=None, max_examples=30)
@given(w=weights(5, 100), weighted=st.booleans())
def test_a_search_finds_the_best_of_three(w: Tensor, weighted: bool) -> None:
    w = w[:5, :100].float()
    importance = torch.rand(w.shape[1], generator=torch.Generator().manual_seed(3)) if weighted else None

    def errors(scale: Tensor) -> Tensor:
        apart = (GRID.decode(GRID.round(w, {"scale": scale}), {"scale": scale}) - w).double().square()
        apart = apart if importance is None else apart * importance
        return torch.stack([block.sum(1) for block in apart.split(32, 1)], 1)

    plain, found = GRID.fit(w)["scale"], GRID.fit(w, True, importance)["scale"]
    tried = torch.stack([errors((plain.int() + step).clamp(0, 252).to(torch.uint8)) for step in (-1, 0, 1)])
    assert (errors(found) <= tried.amin(0) * (1 + 1e-5) + 1e-37).all()
    assert (found.int() - plain.int()).abs().max() <= 1


def test_columns_are_the_whole_weight_s() -> None:
    w = make_weight((7, 75), torch.float32, "normal")
    codes, params = GRID.nearest(w)
    columns, values = GRID.columns(params, (7, 75)), GRID.decode(codes, params)
    for j in range(75):
        found, value = columns.round(j, w[:, j])
        assert torch.equal(found, codes[:, j]) and torch.equal(value, values[:, j])
        some = torch.tensor([5, 0])
        assert torch.equal(columns.round(j, w[some, j], some)[0], codes[some, j])
    columns.refit(64, w[:, 64:] * 4, False, None)
    assert torch.equal(columns.params["scale"][:, 2], params["scale"][:, 2] + 2)
    assert torch.equal(columns.round(70, w[:, 70] * 4)[0], codes[:, 70])


def test_native_columns_round_as_those_of_torch() -> None:
    grid = torch.arange(-56, 57) / 8  # every value, every tie, and between
    w = torch.cat([grid, torch.tensor([8.0, -8.0, 1e-45, -1e-45, -0.0])])[:, None].repeat(1, 32).contiguous()
    params = {"scale": torch.full((len(w), 1), 127, dtype=torch.uint8)}
    columns = GRID.columns(params, (len(w), 32))
    codes = torch.zeros(32, len(w), dtype=torch.uint8)
    levels = columns.levels()
    assert levels is not None
    if gptq.refuse(levels) is not None:
        pytest.skip(str(gptq.refuse(levels)))
    gptq.round_columns(w.T.contiguous(), torch.eye(32), levels, torch.arange(32), None, codes)
    assert torch.equal(codes.T, nearest_codes(w))


@pytest.mark.parametrize("shape", [(1, 1), (9, 75), (24, 96)], ids=str)
def test_gptq(shape: tuple[int, int]) -> None:
    w = make_weight(shape, torch.float32, "normal")
    chosen = Gptq(scales="mse")
    hessian = chosen.observer(shape[1])
    assert hessian is not None
    x = torch.randn(300, shape[1], generator=torch.Generator().manual_seed(1)).cumsum(1)
    hessian.add(x)
    q, plain = chosen.quantize(w, GRID, hessian), Nearest().quantize(w, GRID)
    lost = [(x @ (each.dequantize(torch.float32) - w).T).norm().item() for each in (q, plain)]
    assert lost[0] <= lost[1] * (1 + 1e-6)


@pytest.mark.parametrize("kernel", [Cpu(), CpuInt8()], ids=lambda kernel: kernel.name)
def test_the_native_library_runs_whole_blocks(kernel: Cpu) -> None:
    if native.active().library is None:
        pytest.skip(native.active().reason)
    assert kernel.refuse(GRID, (24, 96), CPU) is None
    assert "32 does not divide rows of 40" in str(kernel.refuse(GRID, (24, 40), CPU))
    assert ReferenceInt8().refuse(GRID, (24, 40), CPU) is Reference().refuse(GRID, (24, 40), CPU) is None


def test_scales_far_apart_on_every_kernel() -> None:
    """From 2**-127 to 2**100 in one weight, decoded bit for bit."""
    codes = torch.randint(0, 16, (6, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([[0, 1, 2], [127, 3, 200], [227, 0, 120], [50, 60, 70], [1, 1, 1], [100, 127, 150]])
    q = QuantizedTensor(codes, GRID, {"scale": scale.to(torch.uint8)})
    ids = torch.arange(6)
    for kernel in (Cpu(), CpuInt8(), Reference(), ReferenceInt8()):
        if kernel.refuse(GRID, q.shape, CPU) is None:
            rows = kernel.embedding(ids, kernel.pack(q), GRID, q.shape, torch.float32)
            assert torch.equal(rows, q.dequantize(torch.float32))
            assert kernel.unpack(kernel.pack(q), GRID, q.shape, q.dtype).equals(q)


def test_integer_products_are_exact() -> None:
    """e2m1 lies on halves: with activations that are whole steps, nothing is rounded."""
    q = Nearest().quantize(make_weight((16, 96), torch.float32, "normal"), GRID)
    x = torch.randint(-127, 128, (5, 96), generator=torch.Generator().manual_seed(1)).float()
    x[:, ::32] = 127
    for kernel in (CpuInt8(), ReferenceInt8()):
        if kernel.refuse(GRID, q.shape, CPU) is None:
            y = kernel.linear(x, kernel.pack(q), GRID, q.shape, None)
            assert torch.allclose(y.double(), x.double() @ q.dequantize(torch.float64).T, rtol=1e-5, atol=1e-3)


def test_requests() -> None:
    assert make_grid(4, "mxfp4") == GRID
    with pytest.raises(RequestError, match="mxfp4 does not know block_size; it has no options"):
        make_grid(4, "mxfp4", block_size=32)
    for format in FORMATS.values():
        if format.name != "packed":
            assert "mxfp4" in str(format.refuse(GRID, (64, 64)))
    assert GRID.remark((4, 64)) is None and "a block of 11 instead of 32" in str(GRID.remark((4, 75)))


@pytest.mark.parametrize("calibrated", [False, True], ids=["", "gptq"])
def test_from_weights_to_a_measured_model(cli: Cli, tmp_path: Path, text_file: Path, calibrated: bool) -> None:
    out, record = tmp_path / "out", tmp_path / "loss.json"
    words = ["--calibration", text_file, "--rows", 2, "--length", 16] if calibrated else []
    done = cli("quantize", "neoquant-demo", "--type", "mxfp4", *words, "--out", out)
    assert done.code == 0, done.error
    model, _ = neoquant.load(out)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    packed = [layer for layer in layers if layer.grid == GRID]
    assert len(packed) == 6 * model.config.num_layers
    if native.active().library is not None:
        assert {layer.kernel.name for layer in packed} == {"cpu"}
    done = cli("compare", "neoquant-demo", out, "--data", text_file, "--json", record)
    assert done.code == 0, done.error
    assert "mxfp4" in json.dumps(json.loads(record.read_text())["candidates"])


def test_all_pairs_of_a_weight_and_a_step_are_covered() -> None:
    """Rounding a value of the grid gives its code, under every scale that float32 holds the value of."""
    codes = torch.tensor([[code for code in range(16) if code != 8]], dtype=torch.uint8)
    for byte, dtype in itertools.product((2, 60, 127, 180, 252), (torch.float32, torch.float64)):
        params = {"scale": torch.tensor([[byte]], dtype=torch.uint8)}
        assert torch.equal(GRID.round(GRID.decode(codes, params, dtype), params), codes)
