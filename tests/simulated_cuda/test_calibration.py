"""Calibrated runs on a GPU: the CPU's weights, and what a layer costs in launches and waits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli, write_tiny_model
from safetensors.torch import load_file
from switch import forced

import neoquant
from neoquant import Recipe
from neoquant.calibration import hidden_states
from neoquant.calibration.dataset import Calibration
from neoquant.cli.environment import facts
from neoquant.data.fingerprints import hash_texts
from neoquant.errors import RequestError
from neoquant.grids import make_grid
from neoquant.quantization import calibrated, resume
from neoquant.quantization.quantize import plan, quantize
from neoquant.quantizers import Gptq, Hessian
from simulated_cuda.device import Counts, simulate

pytestmark = pytest.mark.usefixtures("can_be_simulated")

LENGTH = 24
METHODS: dict[str, dict[str, Any]] = {
    "attention": {"objective": "attention", "correction": 0.0},
    "model": {"objective": "model", "correction": 0.5},
    "layer": {"objective": "layer", "order": "off"},
    "corrected": {"correction": 0.5, "objective": "layer"},
    "ordered": {"order": "dynamic", "scales": "weighted"},
}


def calibration(rows: int = 5) -> Calibration:
    ids = torch.randint(0, 200, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    return Calibration(ids, "made up", hash_texts(["made up"]), 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whose local layers see all: behind their window, a GPU sums in another order than a CPU."""
    folder = tmp_path_factory.mktemp("model") / "plain"
    return write_tiny_model(folder, hidden_size=32, num_heads=4, window_size=LENGTH)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("type", ["affine", "nf4"])
def test_the_weights_are_the_cpus(method: str, type: str, model: Path, tmp_path: Path) -> None:
    options = {**METHODS[method], **({"group_size": 16} if type == "affine" else {"block_size": 32})}
    if type == "nf4" and method == "ordered":
        options |= {"order": "static"}
    recipe = Recipe.simple(4, type, quantizer="gptq", **options)
    here = quantize(model, tmp_path / "here", recipe, calibration=calibration())
    with simulate():
        there = quantize(model, tmp_path / "there", recipe, calibration=calibration(), device="cuda")
    expected, found = (load_file(made.folder / "model.safetensors") for made in (here, there))
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    record = json.loads((there.folder / "calibration.json").read_text())
    assert record.pop("device") == "simulated" and record == json.loads((here.folder / "calibration.json").read_text())


def test_local_layers_change_what_rounding_makes_of_the_last_bits_alone(tmp_path: Path) -> None:
    """A code here and there, where a weight lies between two."""
    model = write_tiny_model(tmp_path / "plain", hidden_size=32, num_heads=4)
    recipe = Recipe.simple(4, "affine", quantizer="gptq", group_size=16, objective="layer")
    here = quantize(model, tmp_path / "here", recipe, calibration=calibration())
    with simulate():
        there = quantize(model, tmp_path / "there", recipe, calibration=calibration(), device="cuda")
    expected, found = (load_file(made.folder / "model.safetensors") for made in (here, there))
    differing = [(found[name] != expected[name]).double().mean() for name in expected if name.endswith("qweight")]
    assert sum(differing) / len(differing) < 0.01


def test_hidden_states_in_files_give_the_same(model: Path, tmp_path: Path) -> None:
    recipe = Recipe.simple(4, "affine", group_size=16, quantizer="gptq")
    samples = calibration(12)
    with simulate():
        plenty = quantize(model, tmp_path / "a", recipe, calibration=samples, device="cuda")
        need = plan(model, recipe, calibration_rows=12, calibration_length=LENGTH, device="cuda").calibrating
        assert need is not None and need.device == "cuda:0" and not need.spilled
        limit = need.memory - 1
        spilled = plan(model, recipe, calibration_rows=12, calibration_length=LENGTH, max_memory=limit, device="cuda")
        assert spilled.calibrating is not None and spilled.calibrating.spilled
        little = quantize(model, tmp_path / "b", recipe, calibration=samples, max_memory=limit, device="cuda")
    a, b = (load_file(made.folder / "model.safetensors") for made in (plenty, little))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_another_device_is_another_request(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.simple(4, "affine", group_size=16, quantizer="gptq")
    keep = calibrated.ResumableRun.keep

    def interrupted(run: Any, number: int, *rest: Any) -> None:
        keep(run, number, *rest)
        raise KeyboardInterrupt

    with simulate():
        monkeypatch.setattr(calibrated.ResumableRun, "keep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(model, tmp_path / "out", recipe, calibration=calibration(), device="cuda")
        monkeypatch.undo()
        with pytest.raises(RequestError, match="device"):
            quantize(model, tmp_path / "out", recipe, calibration=calibration())
        resumed = quantize(model, tmp_path / "out", recipe, calibration=calibration(), device="cuda:0")
    undisturbed = quantize(model, tmp_path / "cpu", recipe, calibration=calibration())
    a, b = (load_file(made.folder / "model.safetensors") for made in (resumed, undisturbed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_no_gpu_does_is_refused(model: Path, tmp_path: Path, cli: Cli) -> None:
    assert "this machine has 0 CUDA devices" in cli("plan", model, "--device", "cuda").error
    with simulate(), pytest.raises(RequestError, match="others round weights on the CPU"):
        quantize(model, tmp_path / "a", Recipe.simple(), device="cuda")


def test_a_model_quantized_as_it_is_loaded_is_calibrated_where_it_will_lie(model: Path) -> None:
    config = neoquant.GPTQConfig(4, dataset=["some text", "and more of it"] * 9, group_size=16, model_seqlen=16)
    here = neoquant.GPTNeoForCausalLM.from_pretrained(model, quantization_config=config, device_map="cpu")
    with simulate() as counts:
        there = neoquant.GPTNeoForCausalLM.from_pretrained(model, quantization_config=config, device_map="cuda")
        assert any(line.startswith("calibration/block_forward") for line in counts.launches)
    for name, tensor in here.state_dict().items():
        if tensor.dtype == torch.int32:
            assert torch.equal(there.state_dict()[name].memory, tensor)


def test_info_says_what_rounds_columns() -> None:
    assert "GPTQ on GPUs" not in dict(facts())
    with simulate():
        assert "rounded by the native library on the CPU (not Triton" in dict(facts())["GPTQ on GPUs"]
        with forced("off"):
            assert "rounded by torch (not Triton" in dict(facts())["GPTQ on GPUs"]


def walk(rows: int, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Counts:
    """What the walk through the unquantized model and back asks for, one row at a time."""
    look = calibrated.look_at_unquantized
    kept: list[Counts] = []

    def counted(*given: Any) -> None:
        with simulate() as gpu:
            look(*given)
        kept.append(gpu)

    recipe = Recipe.simple(4, "affine", quantizer="gptq", group_size=16, objective="model", correction=0.0)
    with monkeypatch.context() as patch:
        for module in (hidden_states, resume):
            patch.setattr(module, "rows_of_batch", lambda length, tokens=0: 1)
        patch.setattr(calibrated, "look_at_unquantized", counted)
        with simulate():
            quantize(model, folder, recipe, calibration=calibration(rows), device="cuda")
    return kept[0]


def test_gradients_wait_for_files_alone(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2 blocks, each row's states before and behind, and both gradients' are kept in files, while the next row's are
    computed; whether all were finite is asked once a layer."""
    few, many = (walk(rows, model, tmp_path / str(rows), monkeypatch) for rows in (2, 4))
    launches, _, copies = (b - a for a, b in zip(few.totals(), many.totals(), strict=True))
    assert copies == 0 and launches <= 2 * 105  # of two more rows
    more = many.waits - few.waits
    assert set(more) == {line for line in more if line.startswith("model/transfers.py")}
    assert more.total() == many.transfers.total() - few.transfers.total() - more.total()
    assert sum(count for line, count in many.waits.items() if line.startswith("quantizers/hessian.py")) == 2 * 9


def cost_of_a_layer(columns: int, rows: int, heads: int, gpu: Counts, grid: Any) -> tuple[int, int, int]:
    """Launches, waits and copies of rounding a weight[rows, columns]."""
    w, x = torch.randn(rows, columns).cuda(), torch.randn(64, columns).cuda()
    K = None if not heads else torch.eye(rows // heads).repeat(heads, 1, 1).cuda()
    hessian = Hessian(columns, torch.device("cuda", 0))
    hessian.add(x)
    Gptq().quantize(w, grid, hessian, K)
    gpu.reset()
    Gptq().quantize(w, grid, hessian, K)
    return gpu.totals()


@pytest.mark.parametrize(
    ("bits", "type", "heads"), [(4, "affine", 0), (4, "affine", 4), (4, "nf4", 0), (4, "nf4", 4), (8, "int8", 0)]
)
def test_rounding_waits_as_often_whatever_the_width(bits: int, type: str, heads: int) -> None:
    grid = make_grid(bits, type)
    with simulate() as gpu:
        narrow, wide = (cost_of_a_layer(columns, 32, heads, gpu, grid) for columns in (64, 256))
        in_torch = type == "int8"  # which the native library does not round column by column
        assert narrow[1] + 2 * in_torch == wide[1] <= 30  # two for another block of 128 columns
        assert narrow[2] == wide[2] <= 4
        assert wide[0] <= (256 * 21 if in_torch else 150)


def test_the_loop_in_torch_waits_for_blocks_not_for_columns() -> None:
    with forced("off"), simulate() as gpu:
        launches, waits, copies = cost_of_a_layer(256, 32, 0, gpu, make_grid(4, "nf4"))
        assert waits <= 16 + 2 * 2 and copies <= 4  # two of each block of 128 columns
        assert launches <= 256 * 21
