"""Layer by layer against transformers: one layer's weight exchanged by hand, one window at a time, in float64."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import neoquant
from neoquant.errors import DataError, RequestError
from neoquant.evaluation import EvaluatedModel, Inspection, ModelInfo, Suite, inspect, scoring
from neoquant.evaluation.corpus import read_corpus
from neoquant.evaluation.inspection_result import Layer
from neoquant.model.names import BLOCK_LINEARS
from neoquant.nn.linear import QuantLinear
from neoquant.progress import SILENT
from neoquant.quantization.recipe import Recipe
from neoquant.report.layers import inspection_table, most_affected
from neoquant.report.shades import relative

RECIPES = {
    "nf4": Recipe.simple(4, "nf4", block_size=32, double_quant=True),
    "int8": Recipe.simple(8, "int8"),
    "affine": Recipe.simple(3, "affine", group_size=16),
    "mixed": Recipe.parse(
        {"rules": [{"match": "*.c_fc", "keep": True}, {"match": "*", "bits": 4, "type": "nf4"}], "name": "mixed"}
    ),
}


def loaded(folder: Path) -> EvaluatedModel:
    return EvaluatedModel(neoquant.load(folder, device="cpu")[0], ModelInfo(name=folder.name))


@pytest.fixture(scope="module")
def quantized(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("quantized")
    return {name: neoquant.quantize(tiny_model, folder / name, recipe).folder for name, recipe in RECIPES.items()}


@pytest.fixture
def suite(text_file: Path) -> Suite:
    return Suite(name="mine", context=16, data={"kind": "file", "path": str(text_file)})


Inspect = Callable[..., Inspection]


@pytest.fixture
def run(tiny_model: Path, quantized: dict[str, Path], suite: Suite) -> Inspect:
    def inspected(name: str, **options: Any) -> Inspection:
        tokenizer = neoquant.load_tokenizer(tiny_model)
        return inspect(loaded(tiny_model), loaded(quantized[name]), tokenizer, suite, **options)

    return inspected


def log_p(model: Any, ids: torch.Tensor, scored: int) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids[None, :-1].long()).logits[0, -scored:].double().log_softmax(-1)


@pytest.mark.parametrize("name", ["nf4", "affine"])
def test_equals_transformers_with_one_layer_exchanged(
    tiny_model: Path, quantized: dict[str, Path], suite: Suite, run: Inspect, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import GPTNeoForCausalLM

    limits = scoring.BatchLimits(positions=40, rows=7)  # several batches, uneven pieces
    monkeypatch.setattr(scoring, "CPU_LIMITS", limits)
    base = GPTNeoForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager").eval()
    other = neoquant.load(quantized[name], device="cpu")[0]
    windows = read_corpus(suite, neoquant.load_tokenizer(tiny_model), SILENT).windows
    result = run(name, rows=100, sensitivity=True)
    assert result.windows == len(windows) and result.tokens == sum(window.scored for window in windows)
    assert [(layer.block, layer.projection) for layer in result.layers] == [
        (number, projection) for number in range(2) for projection in BLOCK_LINEARS
    ]
    for layer in result.layers:
        mine = base.get_submodule(layer.name)
        theirs = other.get_submodule(layer.name)
        assert isinstance(theirs, QuantLinear) and layer.grid == theirs.grid.describe()
        w, q = mine.weight.detach().double(), theirs.quantized.dequantize(torch.float32).double()
        assert layer.weight_error == pytest.approx(float((q - w).square().sum() / w.square().sum()), rel=1e-5)
        exchanged = copy.deepcopy(base)
        exchanged.get_submodule(layer.name).weight = torch.nn.Parameter(q.float())
        inputs: list[torch.Tensor] = []
        hook = mine.register_forward_pre_hook(lambda _, given, inputs=inputs: inputs.append(given[0][0].double()))
        error = output = nats = kl = 0.0
        for window in windows:
            p = log_p(base, window.ids, window.scored)
            x = inputs.pop()[-window.scored :]
            error += float((x @ (q - w).T).square().sum())
            output += float((x @ w.T).square().sum())
            changed = log_p(exchanged, window.ids, window.scored)
            targets = window.ids[-window.scored :, None].long()
            nats += float((p - changed).gather(-1, targets).sum())
            kl += float((p.exp() * (p - changed)).sum())
        hook.remove()
        assert layer.output_error == pytest.approx(error / output, rel=1e-4)
        assert layer.loss is not None
        assert layer.loss.nats_per_token == pytest.approx(nats / result.tokens, rel=1e-3, abs=1e-6)
        assert layer.loss.kl == pytest.approx(kl / result.tokens, rel=1e-3, abs=1e-7)
        assert layer.loss.low is not None and layer.loss.low <= layer.loss.nats_per_token <= (layer.loss.high or 0)


@pytest.mark.parametrize("name", RECIPES)
def test_every_format(run: Inspect, tiny_model: Path, quantized: dict[str, Path], suite: Suite, name: str) -> None:
    result = run(name)
    together = neoquant.compare(
        loaded(tiny_model), [loaded(quantized[name])], neoquant.load_tokenizer(tiny_model), suite
    ).candidates[0]
    assert result.together.kl == pytest.approx(together.total.kl, rel=1e-5)  # 16 windows are the whole text
    assert result.together.nats_per_token == pytest.approx(together.total.nats_per_token, rel=1e-5, abs=1e-7)
    stored = dict(loaded(quantized[name]).model.named_parameters())
    assert ["wte" in note for note in result.notes] == [True] * ("transformer.wte.weight" not in stored)
    for layer in result.layers:
        kept = name == "mixed" and layer.projection.endswith("c_fc")
        assert (layer.grid is None) == kept and (layer.weight_error == 0) == kept == (layer.output_error == 0)
        assert layer.loss is None


@pytest.mark.parametrize("bits", [4, 3])
def test_gptq_folders(make_model: Callable[..., Path], tmp_path: Path, suite: Suite, bits: int) -> None:
    """The same codes, spelled as the GPTQ format and as neoquant's own, show the same errors."""
    source = make_model("even", hidden_size=32, num_heads=4)
    found = {}
    for format in ("gptq", "neoquant"):
        recipe = Recipe.simple(bits, "affine", group_size=32, format=format, embeddings="keep")
        folder = neoquant.quantize(source, tmp_path / format, recipe).folder
        tokenizer = neoquant.load_tokenizer(source)
        found[format] = inspect(loaded(source), loaded(folder), tokenizer, suite, sensitivity=True)
    assert found["gptq"].layers == found["neoquant"].layers and found["gptq"].together == found["neoquant"].together
    assert all(layer.grid and 0 < layer.weight_error < 0.1 for layer in found["gptq"].layers)


def test_models_are_left_as_they_were(tiny_model: Path, quantized: dict[str, Path], suite: Suite) -> None:
    base, other = loaded(tiny_model), loaded(quantized["nf4"])
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    tokenizer = neoquant.load_tokenizer(tiny_model)
    first, second = (inspect(base, other, tokenizer, suite, sensitivity=True, rows=2) for _ in range(2))
    assert first.layers == second.layers and first.windows == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in base.model.modules())


def test_a_model_against_itself(tiny_model: Path, suite: Suite) -> None:
    model = loaded(tiny_model)
    result = inspect(model, model, neoquant.load_tokenizer(tiny_model), suite, sensitivity=True)
    assert result.together.kl == 0 and not most_affected(result)
    for layer in result.layers:
        assert layer.weight_error == layer.output_error == 0
        assert layer.loss is not None and (layer.loss.kl, layer.loss.nats_per_token) == (0, 0)
    assert "no layer differs" in shown(result)


def test_what_differs_elsewhere_is_said(
    make_model: Callable[..., Path], tiny_model: Path, suite: Suite, quantized: dict[str, Path]
) -> None:
    stranger = loaded(make_model(seed=3))
    tokenizer = neoquant.load_tokenizer(tiny_model)
    result = inspect(loaded(tiny_model), stranger, tokenizer, suite)
    assert "outside the blocks' linear layers differ too: transformer.wte.weight" in result.notes[0]
    with pytest.raises(RequestError, match="layers 2 and 3"):
        deeper = make_model("deeper", num_layers=3, attention_layers=["global"] * 3, attention_types=[[["global"], 3]])
        inspect(loaded(tiny_model), loaded(deeper), tokenizer, suite)
    with pytest.raises(RequestError, match="rows is 0"):
        inspect(loaded(tiny_model), loaded(quantized["nf4"]), tokenizer, suite, rows=0)


def test_json_round_trip(run: Inspect) -> None:
    result = run("nf4", sensitivity=True)
    assert Inspection.from_json(result.to_json()) == result
    fields = json.loads(result.to_json())
    assert fields["schema_version"] == "neoquant.inspection/1"
    assert fields["layers"][0]["name"] == "transformer.h.0.attn.attention.q_proj"
    with pytest.raises(DataError, match="not a saved inspection of this version"):
        Inspection.from_json("{}")


def shown(result: Inspection, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(inspection_table(result))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert all(len(line) <= width for line in text.splitlines())
    return text


@pytest.mark.parametrize("width", [80, 200])
def test_the_terminal_shows_every_layer(run: Inspect, width: int) -> None:
    result = run("mixed", sensitivity=True)
    text = shown(result, width)
    for layer in result.layers:
        if layer.weight_error:
            assert layer.loss is not None
            assert f"{100 * layer.output_error:.2f}" in text
            assert (f"{layer.loss.kl:.5f}" if layer.loss.kl >= 1e-4 else f"{layer.loss.kl:.1e}") in text
    assert text.count("0 global") == text.count("1 local") == 3
    assert "h.1.c_fc" not in text  # kept: not among them
    assert "add up to" in text and "…" not in text
    assert "alone" not in shown(run("mixed"), width)


def test_most_affected_and_relative(run: Inspect) -> None:
    result = run("nf4", sensitivity=True)
    losses = [layer.loss.kl for layer in most_affected(result, 5) if layer.loss]
    assert losses == sorted((layer.loss.kl for layer in result.layers if layer.loss), reverse=True)[:5]
    shade = relative([1e-4, 1e-2, 0.0])
    assert [round(shade(v), 6) for v in (0.0, 1e-4, 1e-3, 1e-2)] == [0, 0, 0.5, 1]
    assert relative([])(1.0) == 1 and relative([2.0])(2.0) == 1
    assert 0.5 < relative([1.0, 2.0])(1.0) < 1  # a factor of two is not the whole scale


def test_a_layer_knows_its_name() -> None:
    layer = Layer(
        block=3,
        projection="mlp.c_fc",
        attention="local",
        shape=(4, 2),
        grid=None,
        weight_error=0,
        output_error=0,
        loss=None,
    )
    assert layer.name == "transformer.h.3.mlp.c_fc"
