"""Plans: every tensor is accounted for, refusals come all at once, sizes of the real models are the known ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_CONFIG, tiny_shapes
from shapes import SIZES, checkpoint_of

from neoquant.checkpoint import Checkpoint, TensorHeader, open_checkpoint
from neoquant.errors import CheckpointError, RecipeError, RequestError
from neoquant.model.names import BLOCK_LINEARS, canonical_layer
from neoquant.quantization.plan import Plan, make_plan
from neoquant.quantization.recipe import Recipe

NF4 = Recipe.simple(4, "nf4")
MakeModel = Callable[..., Path]


def planned(config: dict[str, Any], recipe: Recipe = NF4, **changes: Any) -> Plan:
    return make_plan(checkpoint_of(config, **changes), recipe)


def actions(plan: Plan) -> dict[str, str]:
    return {row.name: row.action for row in plan.rows}


def test_every_tensor_has_a_row(tiny_model: Path) -> None:
    with open_checkpoint(tiny_model) as checkpoint:
        plan = make_plan(checkpoint, NF4)
        assert [row.name for row in plan.rows] == list(checkpoint.headers)
        assert plan.source_bytes == checkpoint.nbytes
    quantized = {row.layer for row in plan.rows if row.action == "quantize"}
    assert quantized == {f"transformer.h.{block}.{name}" for block in range(2) for name in BLOCK_LINEARS}
    assert actions(plan)["transformer.wte.weight"] == "keep"
    assert actions(plan)["transformer.h.0.mlp.c_fc.bias"] == "copy"
    assert all(row.reason for row in plan.rows)
    assert all(row.stored for row in plan.rows)


@pytest.mark.parametrize(("size", "nf4_mb"), [("125m", 124), ("1.3b", 838), ("2.7b", 1568)])
def test_sizes_of_the_real_models(size: str, nf4_mb: int) -> None:
    plan = planned(SIZES[size])
    assert plan.output_bytes / 1e6 == pytest.approx(nf4_mb, abs=1)
    assert plan.bits_per_weight_linears == pytest.approx(4.127, abs=0.01)  # with the tables of every layer
    single = planned(SIZES[size], Recipe.simple(4, "fp4", double_quant=False))
    assert single.bits_per_weight_linears == pytest.approx(4.5, abs=0.01)
    assert planned(SIZES[size], Recipe.simple(8, "int8")).bits_per_weight_linears == pytest.approx(8.0, abs=0.05)
    half = planned(SIZES[size], Recipe.simple(4, "nf4", keep=["*.mlp.*"]))
    assert half.bits_per_weight_linears == pytest.approx((4.127 + 2 * 16) / 3, abs=0.01)


def test_memory_does_not_grow_with_depth() -> None:
    deep = SIZES["1.3b"] | {"num_layers": 96, "attention_types": [[["global"], 96]], "attention_layers": None}
    assert planned(deep).peak_memory_bytes == planned(SIZES["1.3b"]).peak_memory_bytes


def test_a_base_model_is_planned_like_the_whole(tiny_model: Path) -> None:
    bare = {name.removeprefix("transformer."): shape for name, shape in tiny_shapes(TINY_CONFIG).items()}
    whole = planned(TINY_CONFIG, Recipe.simple(4, "nf4", keep=["transformer.h.0.*"]))
    plan = planned(TINY_CONFIG, Recipe.simple(4, "nf4", keep=["transformer.h.0.*"]), shapes=bare)
    assert [row.layer for row in plan.rows] == [row.layer for row in whole.rows]
    assert [row.action for row in plan.rows] == [row.action for row in whole.rows]
    assert "h.1.mlp.c_fc.weight" in {header.name for header in plan.stored}
    assert plan.config["quantization_config"] == whole.config["quantization_config"]


@pytest.mark.parametrize("head", ["score", "classifier", "qa_outputs"])
def test_heads_are_kept(head: str) -> None:
    shapes = tiny_shapes(TINY_CONFIG) | {f"{head}.weight": (2, 24), f"{head}.bias": (2,)}
    plan = planned(TINY_CONFIG, shapes=shapes)
    assert actions(plan)[f"{head}.weight"] == "keep"
    assert canonical_layer(f"{head}.weight") == head
    assert not any("no part of" in note for note in plan.notes)
    with pytest.raises(RecipeError, match=f"{head} cannot be quantized"):
        planned(
            TINY_CONFIG,
            Recipe.parse(
                {
                    "name": "x",
                    "rules": [
                        {"match": head, "bits": 4, "type": "nf4"},
                        {"match": "*", "bits": 4, "type": "nf4"},
                    ],
                }
            ),
            shapes=shapes,
        )


def test_tied_and_untied_heads() -> None:
    shapes = tiny_shapes(TINY_CONFIG)
    both = shapes | {"lm_head.weight": shapes["transformer.wte.weight"]}
    tied = planned(TINY_CONFIG, shapes=both)
    assert actions(tied)["lm_head.weight"] == "drop"
    assert tied.bits_per_weight_model == planned(TINY_CONFIG).bits_per_weight_model
    assert any("lm_head.weight is not written" in note for note in tied.notes)
    untied = planned(TINY_CONFIG | {"tie_word_embeddings": False}, shapes=both)
    assert actions(untied)["lm_head.weight"] == "keep"
    only_head = {name: shape for name, shape in both.items() if name != "transformer.wte.weight"}
    plan = planned(TINY_CONFIG, shapes=only_head)
    assert [header.name for header in plan.stored].count("transformer.wte.weight") == 1
    assert "lm_head.weight" not in {header.name for header in plan.stored}


@pytest.mark.parametrize(
    ("source", "asked", "stored"),
    [
        (torch.float32, "auto", torch.float16),
        (torch.float16, "auto", torch.float16),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.bfloat16, "float16", torch.float16),
    ],
)
def test_type_of_what_is_kept(source: torch.dtype, asked: Any, stored: torch.dtype) -> None:
    config = TINY_CONFIG | {"torch_dtype": "float32"}
    plan = planned(config, Recipe.simple(4, "nf4", dtype=asked), dtype=source)
    assert {row.stored[0].dtype for row in plan.rows if row.action != "quantize"} == {stored}
    assert plan.config["dtype"] == plan.config["torch_dtype"] == str(stored).removeprefix("torch.")


def test_linears_without_a_rule_are_kept_and_said() -> None:
    recipe = Recipe.parse({"name": "x", "rules": [{"match": "*.mlp.*", "bits": 4, "type": "nf4"}]})
    plan = planned(TINY_CONFIG, recipe)
    assert any(note.startswith("8 linears stay in half precision because no rule") for note in plan.notes)
    row = next(row for row in plan.rows if row.layer == "transformer.h.0.attn.attention.q_proj")
    assert (row.action, row.reason) == ("keep", "no rule matches it")


def test_all_refusals_at_once() -> None:
    recipe = Recipe.parse(
        {"name": "x", "rules": [{"match": "*.c_fk", "keep": True}, {"match": "*.wte", "bits": 8, "type": "int8"}]}
    )
    with pytest.raises(RecipeError) as caught:
        planned(TINY_CONFIG, recipe)
    for words in ("rule 1 (match = '*.c_fk'): matches no layer", "rule 2", "cannot be quantized", "nothing is left"):
        assert words in str(caught.value)


def test_formats() -> None:
    mixed = {
        "name": "mixed",
        "rules": [{"match": "*.mlp.*", "bits": 8, "type": "int8"}, {"match": "*", "bits": 4, "type": "nf4"}],
    }
    plan = planned(TINY_CONFIG, Recipe.parse(mixed))
    assert plan.format.family == "neoquant"
    assert any(note.startswith("only neoquant reads the result") for note in plan.notes)
    with pytest.raises(RecipeError, match='format = "bitsandbytes" cannot hold this: '):
        planned(TINY_CONFIG, Recipe.parse({**mixed, "format": "bitsandbytes"}))
    assert planned(SIZES["125m"]).format.family == "bitsandbytes"
    assert not planned(SIZES["125m"]).notes
    own = planned(SIZES["125m"], Recipe.simple(4, "nf4", format="neoquant"))
    assert own.format.family == "neoquant"
    assert not own.notes
    (caution,) = planned(SIZES["125m"], Recipe.simple(4, "nf4", block_size=512)).notes
    assert caution.startswith("blocks of 512 cross rows of 768")


@pytest.mark.parametrize("method", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "gptq"}])
def test_quantized_sources_are_refused(method: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"already quantized: .*give the model it was made from"):
        planned(TINY_CONFIG | {"quantization_config": method})


def test_blocks_must_be_as_the_configuration_says() -> None:
    shapes = tiny_shapes(TINY_CONFIG)
    fewer = {name: shape for name, shape in shapes.items() if ".h.1.mlp" not in name}
    with pytest.raises(CheckpointError, match=r"lacks 4 of .*: transformer\.h\.1\.mlp\.c_fc\.weight, .*num_layers = 2"):
        planned(TINY_CONFIG, shapes=fewer)
    more = shapes | {"transformer.h.2.mlp.c_fc.weight": (96, 24)}
    with pytest.raises(CheckpointError, match=r"h\.2\.mlp\.c_fc\.weight unexpected"):
        planned(TINY_CONFIG, shapes=more)
    wrong = shapes | {"transformer.h.1.mlp.c_fc.weight": (24, 96)}
    with pytest.raises(CheckpointError, match=r"h\.1\.mlp\.c_fc\.weight' is \[24, 96\], but .* \[96, 24\]"):
        planned(TINY_CONFIG, shapes=wrong)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight is float8_e4m3fn, expected one of float32, .*float64"):
        planned(TINY_CONFIG, dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("base", [True, False])
def test_every_tensor_of_the_network_must_be_there_in_its_shape(tied: bool, base: bool) -> None:
    config = TINY_CONFIG | {"tie_word_embeddings": tied, "architectures": None if base else ["GPTNeoForCausalLM"]}
    shapes = tiny_shapes(config)
    for name, shape in shapes.items():
        optional = name == "lm_head.weight" and base
        without = {known: size for known, size in shapes.items() if known != name}
        stored = {known.removeprefix("transformer."): size for known, size in without.items()} if base else without
        if optional:
            planned(config, shapes=stored)
        else:
            with pytest.raises(CheckpointError, match=f"lacks 1 of the model's tensors: {re.escape(name)};"):
                planned(config, shapes=stored)
        wrong = shapes | {name: (shape[0] + 1, *shape[1:])}
        with pytest.raises(CheckpointError, match=f"'{re.escape(name)}' is \\[{shape[0] + 1}.*says \\[{shape[0]}"):
            planned(config, shapes=wrong)


def test_what_is_unknown_is_kept_and_said() -> None:
    extra = {"transformer.extra.weight": (3, 3), "lm_head.bias": (259,), "transformer.h.0.mlp.c_fc.scale": ()}
    plan = planned(TINY_CONFIG, shapes=tiny_shapes(TINY_CONFIG) | extra)
    assert [actions(plan)[name] for name in extra] == ["keep", "copy", "copy"]
    assert [note for note in plan.notes if all(name in note for name in extra)]
    assert not any("no part of a GPT-Neo" in note for note in planned(TINY_CONFIG).notes)


def test_what_readers_would_take_for_a_part_of_a_layer_is_refused() -> None:
    layer = "transformer.h.0.mlp.c_fc"
    shapes = tiny_shapes(TINY_CONFIG) | {f"{layer}.weight_fake_quant.scale": (1,)}
    with pytest.raises(CheckpointError, match=rf"{layer}\.weight_fake_quant\.scale' would be taken for a part of"):
        planned(TINY_CONFIG, shapes=shapes)
    planned(TINY_CONFIG, Recipe.simple(4, "nf4", keep=[layer]), shapes=shapes)


def test_a_plan_is_plain_values() -> None:
    import json

    plain = planned(TINY_CONFIG).to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert Recipe.parse(plain["recipe"]) == NF4


def test_headers_of_the_stored_tensors() -> None:
    plan = planned(TINY_CONFIG, Recipe.simple(8, "int8"))
    names = [header.name for header in plan.stored]
    assert len(names) == len(set(names))
    weight = next(header for header in plan.stored if header.name == "transformer.h.0.mlp.c_fc.weight")
    assert weight == TensorHeader("transformer.h.0.mlp.c_fc.weight", torch.int8, (96, 24))
    assert isinstance(checkpoint_of(TINY_CONFIG), Checkpoint)
