"""Saved models: in one type, in the format they came from, beside what the folder holds already."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tokenizer
from safetensors.torch import load_file, save_file

import neoquant
from neoquant import GPTNeoForCausalLM, OutputError, Recipe, RequestError
from neoquant.formats import detect
from neoquant.model.names import EMBEDDING

MakeModel = Callable[..., Path]
IDS = torch.arange(1, 9)[None]
HALVES = [torch.float16, torch.bfloat16]
FLOATS = [torch.float32, *HALVES]
WIDE: dict[str, Any] = {"hidden_size": 64, "num_heads": 4}
NF4 = Recipe.simple(4, "nf4")


def plain_types(folder: Path) -> set[torch.dtype]:
    """The types of the tensors that are no part of a quantized layer."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    format = detect(config, tensors)
    layers = format.quantized(tensors) if format else {}
    packed = {layer + suffix for layer, suffixes in layers.items() for suffix in suffixes}
    return {tensor.dtype for name, tensor in tensors.items() if name not in packed}


@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize("computed", [None, *FLOATS])
@pytest.mark.parametrize("said", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_plain_tensors_beside_quantized_ones_have_one_type(
    make_model: MakeModel, tmp_path: Path, stored: torch.dtype, computed: torch.dtype | None, said: dict[str, Any]
) -> None:
    source = make_model(dtype=str(stored).removeprefix("torch."))
    model = GPTNeoForCausalLM.from_pretrained(source, quantization_config=said, dtype=computed, device_map="cpu")
    model.save_pretrained(tmp_path / "out")
    (found,) = plain_types(tmp_path / "out")
    assert found == (stored if computed in (None, torch.float32) else computed)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(found).removeprefix("torch.")
    again = GPTNeoForCausalLM.from_pretrained(tmp_path / "out", dtype=model.dtype, device_map="cpu")
    for name, value in again.state_dict().items():
        assert torch.equal(value.float(), model.state_dict()[name].float()), "no value has changed"


@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize(
    "recipe", [NF4, Recipe.simple(8, "int8", format="bitsandbytes"),
               Recipe.simple(4, "affine", group_size=32, symmetric=True, format="compressed-tensors")],
    ids=["bnb4", "bnb8", "compressed"],
)  # fmt: skip
def test_transformers_runs_what_was_quantized_on_loading(
    make_model: MakeModel, tmp_path: Path, stored: torch.dtype, recipe: Recipe
) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors" if recipe.format == "compressed-tensors" else "bitsandbytes")
    source = make_model(dtype=str(stored).removeprefix("torch."), **WIDE)
    model = GPTNeoForCausalLM.from_pretrained(source, quantization_config=recipe, device_map="cpu")
    model.save_pretrained(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu").eval()
    with torch.no_grad():
        found, expected = theirs(IDS).logits.float(), model(IDS).logits.float()
    assert (found - expected).abs().max() <= 0.1 * expected.abs().max()


@pytest.mark.parametrize("asked", ["bitsandbytes", "gptq", "compressed-tensors", "neoquant"])
def test_the_format_stays(make_model: MakeModel, tmp_path: Path, asked: Any) -> None:
    kind = ("nf4", {}) if asked == "bitsandbytes" else ("affine", {"group_size": 32, "symmetric": True})
    recipe = Recipe.simple(4, kind[0], format=asked, **kind[1])  # type: ignore[arg-type]
    made = neoquant.quantize(make_model(**WIDE), tmp_path / "made", recipe)
    model = GPTNeoForCausalLM.from_pretrained(made.folder)
    assert model.quantization_format == made.plan.format.name
    for number in range(2):
        model.save_pretrained(tmp_path / str(number))
        stated = json.loads((tmp_path / str(number) / "config.json").read_text())["quantization_config"]
        assert stated["quant_method"] == asked
        before, model = model, GPTNeoForCausalLM.from_pretrained(tmp_path / str(number))
        assert torch.equal(model(IDS).logits, before(IDS).logits)


def test_a_format_that_no_longer_holds_all_layers_is_left(make_model: MakeModel, tmp_path: Path) -> None:
    from neoquant.grids import make_grid
    from neoquant.nn.linear import QuantLinear
    from neoquant.quantizers import Nearest

    model = GPTNeoForCausalLM.from_pretrained(make_model(**WIDE), quantization_config=NF4)
    assert model.quantization_format == "bnb4"
    layer = model.transformer.h[0].mlp.c_fc
    other = Nearest().quantize(layer.quantized.dequantize(torch.float32), make_grid(8, "int8"))
    model.set_submodule("transformer.h.0.mlp.c_fc", QuantLinear(other, layer.bias))
    model.save_pretrained(tmp_path / "out")
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stated["quant_method"] == "neoquant"
    assert torch.equal(GPTNeoForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("force", [False, True])
def test_a_model_goes_where_a_tokenizer_is(make_model: MakeModel, tmp_path: Path, force: bool) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    write_tokenizer(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = GPTNeoForCausalLM.from_pretrained(make_model())
    model.save_pretrained(folder, force=force)
    assert before.items() <= {path.name: path.read_bytes() for path in folder.iterdir()}.items()
    assert torch.equal(neoquant.load(folder)[0](IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("said", [None, NF4, Recipe.simple(4, "affine", group_size=32, format="neoquant")])
@pytest.mark.parametrize("by", ["neoquant", "transformers"])
def test_a_model_is_saved_over_its_former_self(make_model: MakeModel, tmp_path: Path, said: Any, by: str) -> None:
    """As training loops do at every epoch, and into the folder that its own weights are mapped from."""
    folder = tmp_path / "out"
    first = GPTNeoForCausalLM.from_pretrained(make_model(**WIDE), quantization_config=said)
    if by == "neoquant":
        first.save_pretrained(folder, max_shard_size="20kB")
    else:
        pytest.importorskip("transformers")
        first.to_transformers().save_pretrained(folder)
    write_tokenizer(folder)
    kept = (folder / "tokenizer.json").read_bytes()
    model = GPTNeoForCausalLM.from_pretrained(folder)
    for number in range(2):
        with torch.no_grad():
            model.transformer.ln_f.bias += number + 1.0
        model.save_pretrained(folder)
        expected = model(IDS).logits  # what was mapped is there as long as it is used
        assert torch.equal(GPTNeoForCausalLM.from_pretrained(folder)(IDS).logits, expected)
    assert (folder / "tokenizer.json").read_bytes() == kept
    assert not list(folder.glob("model-*")), "shards of the former one would be read, or lie there for nothing"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_would_be_lost_is_asked_for(make_model: MakeModel, tmp_path: Path) -> None:
    """A model of another kind, or what saving did not write, is replaced by force only."""
    folder = tmp_path / "out"
    plain = GPTNeoForCausalLM.from_pretrained(make_model(**WIDE), dtype=torch.float32)
    plain.save_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    nf4 = GPTNeoForCausalLM.from_pretrained(folder, quantization_config=NF4)
    others = {
        "quantized": nf4,
        "in half the bits": GPTNeoForCausalLM.from_pretrained(folder, dtype=torch.float16),
        "of another class": neoquant.GPTNeoModel.from_pretrained(folder),
        "of another size": GPTNeoForCausalLM.from_pretrained(make_model("small", hidden_size=32, num_heads=4)),
    }
    for what, other in others.items():
        with pytest.raises(OutputError, match=r"exists.*force=True"):
            other.save_pretrained(folder)
        assert before == {path.name: path.read_bytes() for path in folder.iterdir()}, what
    (folder / "notes.txt").write_text("the only copy")
    with pytest.raises(OutputError, match=r"exists.*force=True"):
        plain.save_pretrained(folder)
    assert (folder / "notes.txt").exists()
    (folder / "notes.txt").unlink()
    nf4.save_pretrained(folder, force=True)
    int8 = GPTNeoForCausalLM.from_pretrained(make_model("again", **WIDE), quantization_config={"load_in_8bit": True})
    for other in (plain, int8):
        with pytest.raises(OutputError, match=r"exists.*force=True"):
            other.save_pretrained(folder)
    assert torch.equal(GPTNeoForCausalLM.from_pretrained(folder)(IDS).logits, nf4(IDS).logits)


def test_other_files_are_not_replaced(make_model: MakeModel, tmp_path: Path) -> None:
    model = GPTNeoForCausalLM.from_pretrained(make_model())
    folder = tmp_path / "out"
    folder.mkdir()
    write_tokenizer(folder)
    (folder / "thesis.tex").write_text("the only copy")
    with pytest.raises(OutputError, match="exists"):
        model.save_pretrained(folder)
    with pytest.raises(OutputError, match="not a model folder"):
        model.save_pretrained(folder, force=True)
    assert (folder / "thesis.tex").read_text() == "the only copy"


@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_auto_is_the_files_type_where_config_json_is_silent(
    make_model: MakeModel, stored: torch.dtype, kind: str
) -> None:
    transformers = pytest.importorskip("transformers")
    source = make_model(dtype=str(stored).removeprefix("torch."))
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    if kind == "bin":
        torch.save(tensors, source / "pytorch_model.bin")
        (source / "model.safetensors").unlink()
    else:  # one tensor of another type does not decide
        tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"].float()
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    model = GPTNeoForCausalLM.from_pretrained(source, dtype="auto")
    assert model.dtype == stored == transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto").dtype


@pytest.mark.parametrize("stored", HALVES)
@pytest.mark.parametrize("silent", [True, False])
@pytest.mark.parametrize("recipe", [Recipe.simple(8, "int8", format="bitsandbytes"), NF4], ids=["int8", "nf4"])
def test_dequantized_weights_have_the_type_of_what_is_beside_them(
    make_model: MakeModel, tmp_path: Path, stored: torch.dtype, silent: bool, recipe: Recipe
) -> None:
    made = neoquant.quantize(make_model(dtype=str(stored).removeprefix("torch.")), tmp_path / "made", recipe).folder
    if silent:
        config = json.loads((made / "config.json").read_text())
        del config["dtype"]
        (made / "config.json").write_text(json.dumps(config))
    plain = neoquant.convert(made, tmp_path / "plain", dequantize=True).folder
    assert {tensor.dtype for tensor in load_file(plain / "model.safetensors").values()} == {stored}
    assert json.loads((plain / "config.json").read_text())["dtype"] == str(stored).removeprefix("torch.")
    assert EMBEDDING in load_file(plain / "model.safetensors")


@pytest.mark.parametrize("quantized", [True, False])
def test_padding_may_have_an_id_that_no_token_has(make_model: MakeModel, quantized: bool) -> None:
    source = make_model()
    recipe = Recipe.simple(8, "int8", format="neoquant", embeddings="int8") if quantized else None
    model = GPTNeoForCausalLM.from_pretrained(source, quantization_config=recipe)
    ids, mask = torch.tensor([[5, 6, 7, 300], [1, 2, 3, 4]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    inside = ids.masked_fill(mask == 0, 0)
    found, expected = model(ids, attention_mask=mask).logits, model(inside, attention_mask=mask).logits
    assert torch.equal(found[mask == 1], expected[mask == 1])
    flipped, behind = ids.flip(1), mask.flip(1)
    new = model.generate(flipped, attention_mask=behind, max_new_tokens=3)[:, 4:]
    assert torch.equal(new, model.generate(inside.flip(1), attention_mask=behind, max_new_tokens=3)[:, 4:])


@pytest.mark.parametrize("largest", ["20KB", 20_000, "0.5KB", "5GB"])
def test_shards_are_transformers(make_model: MakeModel, tmp_path: Path, largest: int | str) -> None:
    transformers = pytest.importorskip("transformers")
    model = GPTNeoForCausalLM.from_pretrained(make_model(dtype="float32"))
    model.save_pretrained(tmp_path / "out", max_shard_size=largest, safe_serialization=True)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 1) == (largest != "5GB")
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 20_000 or largest == "5GB"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_what_cannot_be_saved_so_is_refused_first(make_model: MakeModel, tmp_path: Path) -> None:
    model = GPTNeoForCausalLM.from_pretrained(make_model())
    with pytest.raises(RequestError, match=r"safe_serialization=False .* legal is True only"):
        model.save_pretrained(tmp_path / "out", safe_serialization=False)
    for size in ("many", "5XB", 0, -1, "0"):
        with pytest.raises(RequestError, match=f"max_shard_size {size!r} is not a size; write it like 500MB"):
            model.save_pretrained(tmp_path / "out", max_shard_size=size)
    assert not (tmp_path / "out").exists()
