"""Calibrated runs: what layers are shown, block after block, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import write_tiny_model
from torch import Tensor, nn

from neoquant.calibration.attention_hessian import attention_hessians
from neoquant.calibration.block_forward import BlockForward
from neoquant.calibration.dataset import Calibration, draw
from neoquant.calibration.hidden_states import HiddenStatesInMemory
from neoquant.calibration.summary import by_projection, remarks
from neoquant.data.fingerprints import hash_texts
from neoquant.errors import RequestError
from neoquant.loading.load import load_model
from neoquant.loading.pretrained import GPTNeoForCausalLM
from neoquant.model.config import GPTNeoConfig
from neoquant.model.names import SHARED_INPUTS
from neoquant.nn.linear import QuantLinear
from neoquant.quantization.quantize import plan, quantize
from neoquant.quantization.recipe import Recipe
from neoquant.quantizers import Gptq, Hessian

GPTQ3 = Recipe.simple(3, "affine", group_size=32, quantizer="gptq", objective="attention", correction=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("calibration") / "plain", hidden_size=32, num_heads=4)


def calibration(rows: int = 12, length: int = 24, seed: int = 0) -> Calibration:
    ids = torch.randint(0, 200, (rows, length), generator=torch.Generator().manual_seed(seed))
    return Calibration(ids, "made up", hash_texts(["made up"]), seed)


def embedded(model: GPTNeoForCausalLM, ids: Tensor) -> Tensor:
    return model.transformer.wte(ids) + model.transformer.wpe(torch.arange(ids.shape[1]))


def damaged(w: Tensor) -> Tensor:
    """Stands for a quantizer: anything that changes the weight."""
    return (w * 16).round() / 16


def replace_weight(linear: nn.Linear, w: Tensor) -> None:
    linear.weight = nn.Parameter(w, requires_grad=False)


@torch.inference_mode()
def test_layers_are_shown_what_the_quantized_model_gives_them(model: Path) -> None:
    plain, changed = load_model(model, GPTNeoForCausalLM), load_model(model, GPTNeoForCausalLM)
    ids = calibration().ids
    forward = BlockForward(HiddenStatesInMemory.of(embedded(plain, ids), 5 * ids.shape[1]), plain.config.window_size)
    expected: dict[str, Tensor] = {}
    for block, twin in zip(plain.transformer.h, changed.transformer.h, strict=True):
        before = forward.hidden.to_tensor()
        stages = 0
        for stage in forward.stages(block):  # earlier layers of the block changed already, later ones not yet
            assert tuple(stage.linears) == SHARED_INPUTS[stages]
            stages += 1
            shown = torch.cat([batch.reshape(-1, stage.in_features) for batch in stage.inputs()])
            linear = twin.get_submodule(next(iter(stage.linears)))
            hook = linear.register_forward_pre_hook(lambda _, given: expected.update(x=given[0]))
            twin(before, forward.masks)
            hook.remove()
            assert torch.allclose(shown, expected["x"].reshape(shown.shape), atol=1e-5)
            for name, layer in stage.linears.items():
                theirs = twin.get_submodule(name)
                assert isinstance(theirs, nn.Linear) and torch.equal(theirs.weight, layer.weight)
                replace_weight(layer, damaged(layer.weight))
                replace_weight(theirs, damaged(theirs.weight))
        assert stages == len(SHARED_INPUTS)
        assert torch.allclose(forward.hidden.to_tensor(), twin(before, forward.masks), atol=1e-5)


def test_a_folder_is_the_quantizer_applied_block_by_block(model: Path, tmp_path: Path) -> None:
    made = quantize(model, tmp_path / "out", GPTQ3, calibration=calibration())
    again = quantize(model, tmp_path / "again", GPTQ3, calibration=calibration())
    for name in ("model.safetensors", "config.json", "calibration.json"):
        assert (made.folder / name).read_bytes() == (again.folder / name).read_bytes(), name
    assert made.source_hash == quantize(model, tmp_path / "nf4", Recipe.simple()).source_hash
    loaded, plain = load_model(made.folder, GPTNeoForCausalLM), load_model(model, GPTNeoForCausalLM)
    with torch.inference_mode():
        forward = BlockForward(HiddenStatesInMemory.of(embedded(plain, calibration().ids)), plain.config.window_size)
        for block, quantized in zip(plain.transformer.h, loaded.transformer.h, strict=True):
            for stage in forward.stages(block):
                hessian = Hessian(stage.in_features)
                for batch in stage.inputs():
                    hessian.add(batch)
                weighing: dict[str, Tensor] = {}
                if len(stage.linears) == 3:
                    weighing = attention_hessians(block.attn.attention, stage.inputs(), len(calibration().ids))
                for name, linear in stage.linears.items():
                    grid, weight = GPTQ3.rules[0].grid(), linear.weight.detach()
                    q = Gptq(objective="attention").quantize(
                        weight, grid, hessian, weighing.get(name.rpartition(".")[2])
                    )
                    replace_weight(linear, q.dequantize(torch.float32))
                    layer = quantized.get_submodule(name)
                    assert isinstance(layer, QuantLinear)
                    assert torch.allclose(layer.quantized.dequantize(torch.float32), linear.weight, atol=1e-6)


def test_the_record_says_what_gradients_were_computed_of(model: Path, tmp_path: Path) -> None:
    recipe = Recipe.simple(4, "affine", group_size=16, quantizer="gptq", objective="model")
    made = quantize(model, tmp_path / "out", recipe, calibration=calibration(seed=4))
    record = json.loads((made.folder / "calibration.json").read_text())
    assert record["gradients"] == {"rows": 12, "labels": "drawn from the model", "seed": 4}
    assert {layer["objective"] for layer in record["layers"].values()} == {"model"}
    assert all(0 < layer["error"] < layer["error_nearest"] for layer in record["layers"].values())


def test_records_and_plans(model: Path, tmp_path: Path) -> None:
    recipe = Recipe.simple(4, "nf4", quantizer="gptq", keep=["*.c_proj"])
    assert recipe.name == "nf4-gptq" and GPTQ3.name == "gptq3-g32"
    made = quantize(model, tmp_path / "out", recipe, calibration=calibration())
    record = json.loads((made.folder / "calibration.json").read_text())
    assert record["calibration"] == {
        "source": "made up", "sha256": hash_texts(["made up"]), "rows": 12, "length": 24, "seed": 0,
    }  # fmt: skip
    assert len(record["layers"]) == 10
    assert all(0 < layer["error"] < layer["error_nearest"] for layer in record["layers"].values())
    config = json.loads((made.folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    assert load_model(made.folder, GPTNeoForCausalLM)(calibration().ids[:1]).logits.isfinite().all()


@pytest.mark.parametrize(("bits", "type", "format"), [(4, "nf4", "packed"), (4, "affine", "gptq")])
def test_an_activation_order_goes_where_it_can_be_held(
    model: Path, tmp_path: Path, bits: int, type: str, format: str
) -> None:
    recipe = Recipe.simple(bits, type, quantizer="gptq", order="dynamic", damping=0.02)
    made = quantize(model, tmp_path / "out", recipe, calibration=calibration())
    assert made.plan.format.name == format
    assert plan(model, recipe).stored == made.plan.stored
    record = json.loads((made.folder / "neoquant.json").read_text())
    quantizers = [row["quantizer"] for row in record["tensors"] if "quantizer" in row and "wte" not in row["name"]]
    assert quantizers == [Gptq(order="dynamic", damping=0.02).describe()] * 12
    assert Recipe.parse(record["recipe"]) == recipe
    if format == "gptq":
        assert json.loads((made.folder / "config.json").read_text())["quantization_config"]["desc_act"] is True
    loaded = load_model(made.folder, GPTNeoForCausalLM)
    loaded.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again", GPTNeoForCausalLM)
    ids = calibration().ids[:2]
    assert torch.equal(loaded(ids).logits, again(ids).logits)
    with pytest.raises(RequestError, match=r"format bnb4 cannot hold an activation order \(transformer\.h\.0"):
        plan(model, Recipe.simple(4, "nf4", quantizer="gptq", order="dynamic", format="bitsandbytes"))


def test_what_does_not_fit_is_refused(model: Path, tmp_path: Path) -> None:
    positions = GPTNeoConfig.from_pretrained(model).max_position_embeddings
    for recipe, given, message in (
        (GPTQ3, None, "gptq needs calibration samples: name their text with --calibration"),
        (Recipe.simple(), calibration(), "nearest needs no calibration"),
        (GPTQ3, calibration(length=positions + 1), f"the model has {positions} positions"),
        (GPTQ3, Calibration(torch.full((1, 4), 99999), "", "", 0), "holds token 99999"),
    ):
        with pytest.raises(RequestError, match=message):
            quantize(model, tmp_path / "out", recipe, calibration=given)
        assert not (tmp_path / "out").exists()


def test_rows_are_drawn_from_all_texts() -> None:
    rows = draw([[1, 2, 3], [4, 5]], 0, 50, 3, seed=1)
    assert {tuple(row) for row in rows.tolist()} == {(1, 2, 3), (2, 3, 0), (3, 0, 4), (0, 4, 5), (4, 5, 0)}
    assert torch.equal(rows, draw([[1, 2, 3], [4, 5]], 0, 50, 3, seed=1))
    assert not torch.equal(rows, draw([[1, 2, 3], [4, 5]], 0, 50, 3, seed=2))
    with pytest.raises(RequestError, match="needs 8 tokens for a row, the text has 7"):
        draw([[1, 2, 3], [4, 5]], 0, 1, 8, seed=0)
    with pytest.raises(RequestError, match="0 rows of 3 tokens"):
        draw([[1]], 0, 0, 3, seed=0)
    assert hash_texts(["ab", "c"]) != hash_texts(["a", "bc"])


def test_what_became_of_each_layer_is_summed_up(model: Path, tmp_path: Path) -> None:
    made = quantize(
        model, tmp_path / "out", Recipe.simple(3, "affine", quantizer="gptq", scales="mse"), calibration=calibration()
    )
    record = json.loads((made.folder / "calibration.json").read_text())
    assert (
        record["layers"] == made.layers and made.layers.keys() == made.layer_seconds.keys() and len(made.layers) == 12
    )
    assert {layer["scales"] for layer in made.layers.values()} == {"mse"}
    kinds = by_projection(made.layers, made.layer_seconds)
    assert [kind.name for kind in kinds] == ["q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"]
    assert sum(kind.layers for kind in kinds) == 12
    assert sum(kind.seconds or 0 for kind in kinds) == pytest.approx(sum(made.layer_seconds.values()))
    card = (made.folder / "README.md").read_text()
    assert "## Calibration" in card and f"| `q_proj` | 2 | {kinds[0].error_nearest:.2e} |" in card
    assert abs(made.output_bytes - made.plan.output_bytes) < 4096


def test_remarks_gather_the_layers_that_they_are_true_of() -> None:
    layers = {
        "transformer.h.0.mlp.c_fc": {"error": 0.5, "error_nearest": 1.0, "remarks": ["2 inputs were always zero"]},
        "transformer.h.1.mlp.c_fc": {"error": 0.75, "error_nearest": 1.0, "remarks": ["2 inputs were always zero"]},
        "transformer.h.0.mlp.c_proj": {"error": 0.0, "error_nearest": 0.0},
        "transformer.h.1.mlp.c_proj": {},
    }
    assert remarks(layers) == ["2 inputs were always zero: h.0.mlp.c_fc, h.1.mlp.c_fc"]
    first, second = by_projection(layers, {"transformer.h.0.mlp.c_fc": 2.0})
    assert (first.ratio, first.ratio_worst, first.worst) == (0.625, 0.75, "transformer.h.1.mlp.c_fc")
    assert first.seconds == 2.0 and (second.layers, second.ratio, second.seconds) == (1, 1.0, None)


def test_a_damping_that_is_not_enough_is_raised_and_remarked() -> None:
    hessian = Hessian(8)
    hessian.add(torch.tensor([[1e4] * 7 + [0.0]]))
    weight = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    report = Gptq(damping=1e-18).quantize_with_report(weight, GPTQ3.rules[0].grid(), hessian)[1]
    assert report.retries > 0 and report.damping == pytest.approx(1e-18 * 10**report.retries)
    assert report.to_dict()["remarks"][0] == "1 inputs were always zero"
    assert f"damping was raised to {report.damping:g}" in report.to_dict()["remarks"]
