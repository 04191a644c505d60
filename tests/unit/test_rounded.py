"""Activations rounded to int8: every instruction set against whole numbers, and the way from an option to a figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Cli
from hypothesis import given, settings
from hypothesis import strategies as st
from switch import every_isa, forced
from torch import Tensor
from weights import affine_grids, codebooks, make_weight

import neoquant
from neoquant import native
from neoquant.errors import RequestError
from neoquant.grids import Affine, Codebook, Grid, Int8Rows
from neoquant.kernels import CpuInt8, ReferenceInt8
from neoquant.kernels.rounded import round_activations, run_length
from neoquant.nn.linear import QuantLinear
from neoquant.quantization.quantize import quantize
from neoquant.quantization.recipe import Recipe
from neoquant.quantizers import Nearest
from neoquant.tensor import QuantizedTensor

CPU = torch.device("cpu")
columns = st.one_of(st.integers(1, 200), st.sampled_from([32, 64, 96, 128, 192, 768, 1056, 2200]))


def weight_and_rows(grid: Grid, shape: tuple[int, int], count: int) -> tuple[QuantizedTensor, Tensor]:
    q = Nearest().quantize(make_weight(shape, torch.float16, "normal"), grid)
    x = torch.randn(count, shape[1], generator=torch.Generator().manual_seed(1))
    x[:, shape[1] // 2] *= 100  # an outlier, as language models have them
    x[-1, : shape[1] // 3] = 0
    return q, x


def require_near(y: Tensor, x: Tensor, q: QuantizedTensor, expected: Tensor) -> None:
    """Apart by no more than sums in another order are."""
    length = x.double().norm(dim=-1, keepdim=True) * q.dequantize(torch.float64).norm(dim=1)
    bound = 8 * torch.finfo(torch.float32).eps * x.shape[-1] ** 0.5 * length
    assert ((y.double() - expected.double()).abs() <= bound).all()


@every_isa
@settings(deadline=None, max_examples=60)
@given(
    grid=st.one_of(codebooks, affine_grids, st.just(Int8Rows())), rows=st.integers(1, 70), columns=columns,
    count=st.sampled_from([1, 2, 5, 6, 7, 13, 16, 17, 33]), threads=st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_every_instruction_set_does_what_the_reference_does(
    isa: str, grid: Grid, rows: int, columns: int, count: int, threads: int
) -> None:
    with forced(isa, threads):
        if CpuInt8().refuse(grid, (rows, columns), CPU):
            assert isinstance(grid, Codebook) and columns % 8
            return
        q, x = weight_and_rows(grid, (rows, columns), count)
        expected = ReferenceInt8().linear(x, ReferenceInt8().pack(q), grid, q.shape, None)
        require_near(CpuInt8().linear(x, CpuInt8().pack(q), grid, q.shape, None), x, q, expected)


@every_isa
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("symmetric", "float_zero"), [(False, False), (True, False), (False, True)])
def test_whole_numbers_are_multiplied_exactly(isa: str, bits: int, symmetric: bool, float_zero: bool) -> None:
    """With scales of one every sum is an integer, up to the largest there are; or a half, with such zeros."""
    grid, random = Affine(bits, 32, symmetric, float_zero), torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (33, 200), dtype=torch.uint8, generator=random)
    params = {"scale": torch.ones(33, 7, dtype=torch.float16)}
    if not symmetric:
        params["zero"] = torch.randint(0, 1 << bits, (33, 7), dtype=torch.uint8, generator=random)
    if float_zero:  # beyond the codes as well, on either side
        params["zero"] = torch.randint(-8, 2 << bits, (33, 7), generator=random).half() / 2
    q = QuantizedTensor(codes, grid, params)
    x = torch.randint(-127, 128, (14, 200), generator=random).float()
    x[:, ::32] = 127  # the scale of every run is one
    x[0], x[1] = 127, -127
    codes[0], codes[1] = 0, (1 << bits) - 1
    with forced(isa):
        y = CpuInt8().linear(x, CpuInt8().pack(q), grid, q.shape, None)
    assert torch.equal(y.double(), x.double() @ q.dequantize(torch.float64).T)


@every_isa
def test_what_is_not_finite_stays_so(isa: str) -> None:
    q, x = weight_and_rows(Affine(4, 32), (8, 96), 3)
    x[1, 40], x[2, 95] = torch.nan, torch.inf
    for kernel in (CpuInt8(), ReferenceInt8()):
        with forced(isa):
            y = kernel.linear(x, kernel.pack(q), q.grid, q.shape, None)
        assert y[0].isfinite().all() and not y[1:].isfinite().any()


@pytest.mark.parametrize(
    ("grid", "columns", "run"),
    [(Codebook(), 768, 64), (Codebook(block_size=512), 768, 128), (Codebook(), 96, 32), (Codebook(), 129, 1),
     (Int8Rows(), 768, 128), (Affine(4, 32), 768, 32), (Affine(4, 256), 768, 128), (Affine(4, -1), 768, 128),
     (Affine(4, 64), 24, 128)],
)  # fmt: skip
def test_runs_have_one_scale(grid: Grid, columns: int, run: int) -> None:
    assert run_length(grid, columns) == run


def test_rounding_by_hand() -> None:
    x = torch.tensor([[1.0, -0.4, 0.0, 0.5], [0.0, 0.0, 1e-31, 3.0]])
    steps = torch.tensor([[127.0, -51.0, 0.0, 127.0], [0.0, 0.0, 0.0, 127.0]])
    scales = torch.tensor([[1.0, 1.0, 0.5, 0.5], [0.0, 0.0, 3.0, 3.0]]) / 127
    assert torch.allclose(round_activations(x, 2), steps * scales)


def test_outliers_spoil_their_own_run_only() -> None:
    q, x = weight_and_rows(Affine(8, 64), (64, 1024), 16)
    exact = x @ q.dequantize(torch.float32).T
    y = ReferenceInt8().linear(x, ReferenceInt8().pack(q), q.grid, q.shape, None)
    whole = round_activations(x, 1024) @ q.dequantize(torch.float32).T
    assert (y - exact).norm() < (whole - exact).norm() / 2


def test_gradients_pass() -> None:
    q, x = weight_and_rows(Affine(4, 32), (8, 96), 3)
    for kernel in (ReferenceInt8(), *([CpuInt8()] if native.active().library else [])):
        given_x = x.clone().requires_grad_()
        kernel.linear(given_x, kernel.pack(q), q.grid, q.shape, None).sum().backward()
        assert given_x.grad is not None
        assert torch.allclose(given_x.grad[0], q.dequantize(torch.float32).sum(0), atol=1e-4)


def test_a_layer_keeps_its_weight_and_its_mode() -> None:
    q, x = weight_and_rows(Codebook(), (40, 96), 3)
    layer = QuantLinear(q, torch.ones(40))
    exact = layer(x)
    layer.set_activations("int8")
    assert layer.kernel.activations == "int8" and layer.quantized.equals(q)
    with forced("off"):  # as on a device that the library does not run on
        layer.to("cpu")
        assert layer.kernel.name == "reference-int8" and layer.quantized.equals(q)
        assert not torch.equal(layer(x), exact)
    layer.set_activations("exact")
    require_near(layer(x), x, q, exact)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rounded") / "nf4"
    neoquant.quantize(None, path, neoquant.Recipe.load("nf4"))
    return path


def test_a_model_loses_little(folder: Path) -> None:
    ids = torch.arange(300, 364)[None]
    logits = {}
    for activations in ("exact", "int8"):
        model, _ = neoquant.load(folder, activations=activations)
        kinds = {module.kernel.activations for module in model.modules() if isinstance(module, QuantLinear)}
        assert kinds == {activations}
        with torch.inference_mode():
            logits[activations] = model(ids).logits.log_softmax(-1)
    apart = (logits["exact"].exp() * (logits["exact"] - logits["int8"])).sum(-1)
    assert 0 < apart.mean() < 0.01


def test_requests_that_cannot_be_met(folder: Path) -> None:
    with pytest.raises(RequestError, match="activations are 'int4'; legal are exact and int8"):
        neoquant.load(folder, activations="int4")
    with pytest.raises(RequestError, match="no weight is quantized, so that int8 activations would meet none"):
        neoquant.load(activations="int8")


def test_the_option_is_measured_and_recorded(folder: Path, cli: Cli, text_file: Path, tmp_path: Path) -> None:
    record = tmp_path / "loss.json"
    done = cli("compare", folder, folder, "--activations", "int8", "--data", text_file, "--json", record)
    assert done.code == 0 and "nf4 (int8 activations)" in done.out
    found = json.loads(record.read_text())
    assert found["reference"]["model"]["activations"] == "exact"
    assert [model["evaluation"]["model"]["activations"] for model in found["candidates"]] == ["int8"]


@pytest.mark.skipif(native.active().library is None, reason=native.active().reason)
def test_a_slow_way_is_said(tiny_model: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """The library multiplies a trellis with exact activations only: with int8 ones, torch does, which takes long."""
    for type_, bits in (("trellis", 2), ("nf4", 4)):
        recipe = Recipe.simple(bits, type_, format="neoquant", embeddings="int8")
        quantize(tiny_model, tmp_path / type_, recipe)
    neoquant.load(tmp_path / "nf4", device="cpu", activations="int8")
    neoquant.load(tmp_path / "trellis", device="cpu")
    assert not [warned for warned in recwarn if "plain torch" in str(warned.message)]
    with pytest.warns(neoquant.LoadWarning, match="with int8 activations 12 layers on the grid trellis are"):
        neoquant.load(tmp_path / "trellis", device="cpu", activations="int8")
