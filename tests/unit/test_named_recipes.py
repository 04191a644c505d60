"""Recipes by their names, formats by every name they are documented by, the bundled model wherever one is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from safetensors.torch import load_file

import neoquant
from neoquant import demo
from neoquant.benchmark.run import Request, _targets
from neoquant.errors import RecipeError, RequestError
from neoquant.formats import FORMATS, NAMED, choose
from neoquant.grids import make_grid
from neoquant.quantization.convert import TARGETS
from neoquant.quantization.recipe import FormatChoice, recipe_names


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_recipe_may_be_named_or_be_a_file(make_model: Callable[..., Path], tmp_path: Path) -> None:
    source = make_model(hidden_size=64, num_heads=4)
    recipe = neoquant.Recipe.load("nf4")
    made = [neoquant.quantize(source, tmp_path / str(n) / "out", r).folder for n, r in enumerate(("nf4", recipe))]
    assert files(made[0]) == files(made[1])
    (tmp_path / "mine.toml").write_text('[[rules]]\nmatch = "*"\nbits = 8\ntype = "int8"\n')
    for path in (tmp_path / "mine.toml", str(tmp_path / "mine.toml")):
        assert neoquant.plan(source, path).recipe.name == "mine"
    on_load = neoquant.AutoModelForCausalLM.from_pretrained(source, quantization_config="nf4")
    saved = neoquant.AutoModelForCausalLM.from_pretrained(made[0])
    for (name, a), b in zip(on_load.state_dict().items(), saved.state_dict().values(), strict=True):
        assert a.equal(b), name


@pytest.mark.parametrize(
    ("recipe", "message"),
    [("nf5", "nf5: no such file, and no recipe of that name: .*nf4"), (4, "recipe is of type int; legal is a Recipe")],
)
def test_what_is_no_recipe_is_refused_before_anything_is_read(tmp_path: Path, recipe: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        neoquant.plan(tmp_path / "nothing here", recipe)
    with pytest.raises(RecipeError, match=message):
        neoquant.quantize(tmp_path / "nothing here", tmp_path / "out", recipe)


@pytest.mark.parametrize("name", [name for name in recipe_names() if "gptq" not in name])
def test_every_recipe_plans_the_bundled_model_by_name(name: str) -> None:
    assert neoquant.plan("neoquant-demo", name).recipe == neoquant.Recipe.load(name)


def test_recipes_conversions_and_choices_know_the_same_formats() -> None:
    assert set(get_args(FormatChoice)) == set(NAMED) == {*TARGETS, "auto"} - {"safetensors"}
    assert {*FORMATS, *(format.family for format in FORMATS.values())} < set(NAMED)
    targets = {"layer": (make_grid(4, "affine", group_size=32), (64, 64))}
    with pytest.raises(RequestError, match=r"no format is called 'gguf'; there are auto, bitsandbytes, .*gptq-v2"):
        choose(targets, "gguf")


@pytest.mark.parametrize(
    ("format", "bits", "type"),
    [("bnb4", 4, "nf4"), ("bnb8", 8, "int8"), ("packed", 4, "nf4"), ("gptq-v1", 4, "affine"), ("gptq-v2", 4, "affine")],
)
def test_a_recipe_and_a_conversion_into_a_format_are_the_same(
    make_model: Callable[..., Path], tmp_path: Path, format: Any, bits: int, type: str
) -> None:
    source = make_model(hidden_size=64, num_heads=4)
    options: dict[str, Any] = {"symmetric": True, "group_size": 32} if type == "affine" else {}
    asked = neoquant.Recipe.simple(bits, type, format=format, embeddings="keep", **options)
    one = neoquant.quantize(source, tmp_path / "one" / "m", asked).folder
    via = neoquant.quantize(source, tmp_path / "via" / "m", asked.model_copy(update={"format": "neoquant"})).folder
    two = neoquant.convert(via, tmp_path / "two" / "m", format).folder
    tensors = [load_file(folder / "model.safetensors") for folder in (one, two)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(tensors[0][key].equal(tensors[1][key]) for key in tensors[0])
    stated = [neoquant.AutoConfig.from_pretrained(folder).extra["quantization_config"] for folder in (one, two)]
    assert [each.get("checkpoint_format") for each in stated] == [stated[0].get("checkpoint_format")] * 2


def test_the_bundled_model_may_be_named_everywhere(tmp_path: Path) -> None:
    name = "neoquant-demo"
    model, tokenizer = neoquant.load(name)
    assert neoquant.load_tokenizer(name).sha256 == tokenizer.sha256
    assert neoquant.AutoConfig.from_pretrained(name) == model.config
    assert neoquant.AutoTokenizer.from_pretrained(name).sha256 == tokenizer.sha256
    assert neoquant.quantize(name, tmp_path / "nf4", "nf4").folder.is_dir()
    assert neoquant.pipeline("text-generation", name)("import", max_new_tokens=1)
    assert neoquant.convert(name, tmp_path / "plain", "safetensors").before == "safetensors"
    assert neoquant.push(name, "user/model", dry_run=True).files == neoquant.push(demo.MODEL, "u/m", dry_run=True).files
    targets = [_targets(Request([model], against=["transformers"], base=model)) for model in (name, str(demo.MODEL))]
    assert targets[0] == targets[1] and targets[0][-1].source == str(demo.MODEL)
