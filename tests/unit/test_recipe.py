"""Recipes: what they accept, what they refuse and in which words, and which rule decides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neoquant.errors import RecipeError, RequestError
from neoquant.grids import Codebook, Grid, Int8Rows, legal_pairs, make_grid
from neoquant.quantization.recipe import Recipe, Rule
from neoquant.quantizers import (
    QUANTIZERS,
    Gptq,
    Hessian,
    Quantizer,
    make_quantizer,
    parse_option,
    quantizer_with_options,
)
from neoquant.tensor import QuantizedTensor

LAYERS = [
    f"transformer.h.{block}.{name}"
    for block in range(3)
    for name in ("attn.attention.q_proj", "attn.attention.out_proj", "mlp.c_fc", "mlp.c_proj")
]
OTHERS = ["transformer.wte", "transformer.h.0.ln_1", "lm_head"]
NF4 = {"match": "*", "bits": 4, "type": "nf4"}
GPTQ = {**NF4, "quantizer": "gptq"}


def parse(*rules: dict[str, object], **more: object) -> Recipe:
    return Recipe.parse({"name": "test", "rules": list(rules), **more})


texts = st.text(min_size=1, max_size=12)
rules = st.one_of(
    st.builds(lambda match: {"match": match, "keep": True}, texts),
    st.builds(lambda match: {"match": match, "bits": 8, "type": "int8"}, texts),
    st.builds(
        lambda match, type, block, double: {
            "match": match,
            "bits": 4,
            "type": type,
            "block_size": block,
            "double_quant": double,
        },
        texts,
        st.sampled_from(["nf4", "fp4"]),
        st.sampled_from([32, 64, 4096]),
        st.booleans(),
    ),
    st.builds(
        lambda match, options: {"match": match, "bits": 3, "type": "affine", "quantizer": "gptq", **options},
        texts,
        st.fixed_dictionaries(
            {},
            optional={
                "order": st.sampled_from(["static", "off", "dynamic"]),
                "scales": st.sampled_from(["range", "mse", "weighted"]),
                "damping": st.one_of(st.just(1), st.floats(1e-9, 1)),
            },
        ),
    ),
)


@settings(deadline=None)
@given(
    name=st.from_regex(r"[\w-][\w.-]{0,30}", fullmatch=True),
    description=st.text(max_size=12),
    rules=st.lists(rules, min_size=1, max_size=4),
    dtype=st.sampled_from(["auto", "bfloat16"]),
)
def test_toml_round_trip(tmp_path_factory: pytest.TempPathFactory, **data: object) -> None:
    recipe = Recipe.parse(data)
    path = tmp_path_factory.getbasetemp() / "round-trip.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert Recipe.from_toml(path) == recipe
    assert Recipe.from_toml(path).to_toml() == recipe.to_toml()


def test_simple_is_the_recipe_of_one_rule() -> None:
    recipe = Recipe.simple(4, "nf4", block_size=128, keep=["*.c_proj"])
    assert recipe == Recipe.parse(
        {"name": "nf4-b128", "rules": [{"match": "*.c_proj", "keep": True}, {**NF4, "block_size": 128}]}
    )
    assert recipe.rules[1].grid() == Codebook("nf4", 128, True)
    assert Recipe.simple(8, "int8").rules[0].grid() == Int8Rows()


def test_options_reach_the_quantizer_and_may_be_any_that_it_has() -> None:
    rule = parse({**GPTQ, "order": "off", "damping": 0.1}).rules[0]
    assert rule.make_quantizer() == Gptq(order="off", damping=0.1)
    assert Recipe.simple(4, "nf4", quantizer="gptq", scales="mse").rules[0].make_quantizer() == Gptq(scales="mse")
    for name, cls in QUANTIZERS.items():
        chosen = make_quantizer(name, **cls.options())
        assert chosen == cls() and chosen.describe() == {"name": name, **cls.options()}
        bits, type = next(pair for pair in legal_pairs() if chosen.refuse(make_grid(*pair)) is None)
        rule = {"match": "*", "bits": bits, "type": type, "quantizer": name, **cls.options()}
        assert parse(rule).rules[0].make_quantizer() == chosen


@dataclass(frozen=True)
class Picky(Quantizer):
    """Rounds to int8 rows only."""

    steps: int = 3
    fast: bool = False
    name: ClassVar[str] = "picky"

    def refuse(self, grid: Grid) -> str | None:
        return None if isinstance(grid, Int8Rows) else f"picky cannot round to {grid.name}"

    def _quantize(
        self, w: Tensor, grid: Grid, hessian: Hessian | None, output_hessian: Tensor | None
    ) -> tuple[QuantizedTensor, None]:
        codes, params = grid.nearest(w)
        return QuantizedTensor(codes, grid, params, dtype=w.dtype), None


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUANTIZERS, "picky", Picky)


@pytest.mark.usefixtures("picky")
def test_a_quantizer_refuses_a_grid() -> None:
    assert Recipe.simple(8, "int8", quantizer="picky", steps=5).rules[0].make_quantizer() == Picky(steps=5)
    with pytest.raises(RequestError, match=r"^picky cannot round to nf4$"):
        Recipe.simple(4, "nf4", quantizer="picky")
    with pytest.raises(RequestError, match=r"rule 2 \(match = '\*'\): picky cannot round to nf4$"):
        parse({"match": "*.c_fc", "keep": True}, {**NF4, "quantizer": "picky"})
    with pytest.raises(RequestError, match="picky cannot round to nf4"):
        Picky().quantize(torch.ones(2, 64), Codebook("nf4"))
    unchecked = Recipe.model_validate(
        {"name": "test", "rules": [{**NF4, "quantizer": "picky"}, {"match": "*.c_fk", "keep": True}]}
    )
    refusal, idle = unchecked.complaints(LAYERS, OTHERS)
    assert refusal == f"rule 1 (match = '*'): picky cannot round to nf4 ({LAYERS[0]} and {len(LAYERS) - 1} more)"
    assert idle.startswith("rule 2"), "beside all other reasons"


@pytest.mark.parametrize(
    ("bits", "type", "quantizer", "name"),
    [
        (4, "nf4", None, "nf4"),
        (4, "nf4", "nearest", "nf4"),
        (8, "int8", None, "int8"),
        (3, "affine", None, "affine3-g128"),
        (4, "affine", "gptq", "gptq4-g128"),
        (4, "nf4", "gptq", "nf4-gptq"),
        (8, "int8", "picky", "int8-picky"),
    ],
)
@pytest.mark.usefixtures("picky")
def test_names_say_what_rounds(bits: int, type: str, quantizer: str | None, name: str) -> None:
    """A quantizer's name stands for the grid's where the grid has several widths, and follows it otherwise."""
    assert Recipe.simple(bits, type, quantizer=quantizer).name == name


@pytest.mark.usefixtures("picky")
def test_options_are_read_from_text() -> None:
    texts = {"steps": "7", "fast": "true"}
    parsed = {key: parse_option("picky", key, text) for key, text in texts.items()}
    assert make_quantizer("picky", **parsed) == Picky(steps=7, fast=True)
    assert make_quantizer("gptq", damping=parse_option("gptq", "damping", "0.5")) == Gptq(damping=0.5)
    for key, text, words in (
        ("steps", "1.5", "steps is a number .its default is 3., got '1.5'"),
        ("fast", "yes", "fast is true or false"),
        ("step", "1", "'picky' has no option step; .*picky has steps, fast"),
    ):
        with pytest.raises(RequestError, match=words):
            make_quantizer("picky", **{key: parse_option("picky", key, text)})
    with pytest.raises(RequestError, match=r"'pickier' is not one of .*picky"):
        parse_option("pickier", "steps", "7")


@pytest.mark.usefixtures("picky")
def test_options_imply_the_quantizer_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert quantizer_with_options(["order", "damping"]) == "gptq"
    assert quantizer_with_options(["fast"]) == "picky"
    for none in (["fast", "order"], ["speed"]):
        with pytest.raises(RequestError, match=r"no quantizer has the option .*gptq has order"):
            quantizer_with_options(none)
    monkeypatch.setitem(QUANTIZERS, "other", Picky)
    with pytest.raises(RequestError, match="picky and other have the option fast: name one"):
        quantizer_with_options(["fast"])


def test_first_match_wins() -> None:
    recipe = parse({"match": "*.h.0.*", "keep": True}, {"match": "*.c_proj", "bits": 8, "type": "int8"}, NF4)
    assert recipe.rule_for("transformer.h.0.mlp.c_proj") is recipe.rules[0]
    assert recipe.rule_for("transformer.h.1.mlp.c_proj") is recipe.rules[1]
    assert recipe.rule_for("transformer.h.1.mlp.c_fc") is recipe.rules[2]
    assert parse({**NF4, "match": "*.c_fc"}).rule_for("transformer.h.1.mlp.c_proj") is None


def test_a_rule_may_name_the_weight() -> None:
    assert Rule(match="*.c_fc.weight", keep=True).matches("transformer.h.1.mlp.c_fc")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"rules": [{**NF4, "block_sise": 64}]}, ["rule 1", "unknown key 'block_sise'", "did you mean 'block_size'?"]),
        ({"rules": [NF4], "rule": []}, ["unknown key 'rule'", "did you mean 'rules'?"]),
        ({"rules": []}, ["rules", "at least 1"]),
        ({}, ["rules", "required"]),
        ({"rules": [{**NF4, "bits": "4"}]}, ["rules 1 bits", "integer", "'4'"]),
        ({"rules": [{**NF4, "double_quant": 1}]}, ["rule 1 ", "double_quant is true or false", "got 1"]),
        ({"rules": [NF4], "format": "gguf"}, ["format", "'bitsandbytes'", "'gguf'"]),
        ({"rules": [{**NF4, "bits": 3}]}, ["rule 1 (match = '*')", "3 bits of type 'nf4'", "4 nf4", "8 int8"]),
        ({"rules": [{**NF4, "block_size": 48}]}, ["rule 1", "block size 48", "32, 64"]),
        ({"rules": [NF4, {**NF4, "bits": 8, "type": "int8", "block_size": 64}]}, ["rule 2", "int8", "block_size"]),
        ({"rules": [{"match": "*"}]}, ["rule 1", "bits and type missing", "keep = true"]),
        ({"rules": [{"match": "*", "type": "nf4"}]}, ["rule 1", "bits missing"]),
        ({"rules": [{**NF4, "quantizer": "gptk"}]}, ["rule 1", "'gptk' is not one of", "nearest", "gptq"]),
        ({"rules": [{**NF4, "group_size": 64}]}, ["rule 1", "nf4 does not know group_size"]),
        ({"rules": [{**NF4, "keep": True}]}, ["rule 1", "keep = true", "bits, type cannot apply"]),
        ({"rules": [{**NF4, "quantizer": "gptkew"}]}, ["rule 1", "'gptkew'", "nearest"]),
        (
            {"rules": [{**NF4, "order": "off"}]},
            ["rule 1", "'nearest' has no option order", "gptq has order, scales, d"],
        ),
        ({"rules": [{**GPTQ, "order": "of"}]}, ["rule 1", "order 'of'", "static, off, dynamic"]),
        ({"rules": [{**GPTQ, "order": 1}]}, ["rule 1", "order is a text", "got 1"]),
        ({"rules": [{**GPTQ, "damping": "much"}]}, ["rule 1", "damping is a number", "0.01", "'much'"]),
        ({"rules": [{**GPTQ, "damping": True}]}, ["rule 1", "damping is a number", "True"]),
        ({"rules": [{**GPTQ, "damping": 0}]}, ["rule 1", "damping 0", "more than 0, at most 1"]),
        ({"rules": [{**GPTQ, "dampening": 0.1}]}, ["rule 1", "unknown key 'dampening'", "did you mean 'damping'?"]),
        ({"rules": [{"match": "*", "keep": True, "order": "off"}]}, ["rule 1", "keep = true", "order cannot apply"]),
    ],
)
def test_refusals(data: dict[str, object], words: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        Recipe.parse({"name": "test", **data})
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_simple_does_not_speak_of_rules() -> None:
    with pytest.raises(RequestError, match=r"^5 bits of type 'nf4'"):
        Recipe.simple(5, "nf4")
    with pytest.raises(RecipeError, match=r"^bits: .*valid integer, got '4'$"):
        Recipe.simple("4", "nf4")  # type: ignore[arg-type]


def test_rules_that_change_nothing() -> None:
    recipe = parse({"match": "*.c_fk", "keep": True}, NF4, {"match": "*.c_fc", "keep": True})
    first, second = recipe.complaints(LAYERS, OTHERS)
    assert "rule 1 (match = '*.c_fk'): matches no layer; the closest are" in first
    assert ".c_fc" in first
    assert "rule 3 (match = '*.c_fc')" in second
    assert "earlier rule" in second


def test_equal_rules_are_still_two() -> None:
    keep = {"match": "*.c_fc", "keep": True}
    assert "rule 2" in parse(keep, keep, NF4).complaints(LAYERS)[0]


def test_what_keeps_layers_is_called_as_it_was_typed(tmp_path: Path) -> None:
    kept = Recipe.simple(keep=["*.c_fk", "*.c_fc", "*.h.0.mlp.c_fc"])
    first, second = kept.complaints(LAYERS, OTHERS)
    assert first.startswith("keep '*.c_fk': matches no layer; the closest are")
    assert second == "keep '*.h.0.mlp.c_fc': every layer it matches is kept already"
    assert parse(NF4).keeping(["*.wte", "x"], "--keep").complaints(LAYERS, OTHERS)[0].startswith("--keep 'x': matches")
    assert Recipe.simple(keep=["*"]).complaints(LAYERS, OTHERS) == []  # nothing is left to quantize: the plan says so
    (fault,) = parse(NF4).keeping(["*"], "--keep").complaints(LAYERS, OTHERS)
    assert fault.startswith("rule 2 (match = '*'): every layer it matches is decided by an earlier rule")
    with pytest.raises(RecipeError, match="--keep '' is empty"):
        Recipe.simple().keeping([""], "--keep")
    path = tmp_path / "kept.toml"
    path.write_text(kept.to_toml())
    assert Recipe.from_toml(path) == kept


def test_layers_that_are_always_kept() -> None:
    assert parse({"match": "*.wte", "keep": True}, NF4).complaints(LAYERS, OTHERS) == []
    (fault,) = parse({**NF4, "match": "*.wte"}, NF4).complaints(LAYERS, OTHERS)
    assert "transformer.wte cannot be quantized" in fault


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[[rules]]\nmatch = "*"\nbits = 4\ntype = "fp4"\n')
    assert Recipe.load(path).name == "mine"
    assert Recipe.load("nf4").name == "nf4"
    with pytest.raises(RecipeError, match=r"nf5: no such file, and no recipe of that name: .*nf4"):
        Recipe.load("nf5")
    path.write_text("[[rules]\n")
    with pytest.raises(RecipeError, match=r"mine\.toml: is not TOML: .*line 1"):
        Recipe.load(path)
    path.write_bytes(b"\xff")
    with pytest.raises(RecipeError, match=r"mine\.toml: cannot be read as UTF-8"):
        Recipe.load(path)
    with pytest.raises(RecipeError, match="is a folder, expected a file"):
        Recipe.from_toml(tmp_path)


@pytest.mark.parametrize("options", [{}, {"group_size": 64}, {"double_quant": False}, {"block_size": 128}], ids=str)
def test_a_built_in_recipe_shares_its_name_with_no_other(options: dict[str, Any]) -> None:
    """A recipe that options describe is called like a built-in one only if it has its grid and quantizer."""
    built_in = {path.stem for path in (Path(__file__).resolve().parents[2] / "recipes").glob("*.toml")}
    named = 0
    for bits, type in legal_pairs():
        for quantizer in QUANTIZERS:
            try:
                made = Recipe.simple(bits, type, quantizer=quantizer, **options)
            except RequestError:  # the grid has no such option, or the quantizer refuses it
                continue
            if made.name in built_in:
                named += 1
                found = Recipe.load(made.name)
                assert [rule.grid() for rule in found.rules] == [rule.grid() for rule in made.rules]
                assert [rule.quantizer for rule in found.rules] == [rule.quantizer for rule in made.rules]
    assert named or options
