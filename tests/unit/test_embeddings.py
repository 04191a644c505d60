"""A quantized token embedding: planned, stored once, used for rows and for logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import neoquant
from neoquant import GPTNeoForCausalLM, GPTNeoModel, RecipeError
from neoquant.checkpoint import open_checkpoint
from neoquant.cli.describe import describe
from neoquant.grids import make_grid
from neoquant.model.names import EMBEDDING
from neoquant.nn.linear import QuantEmbedding, QuantLinear
from neoquant.quantization.plan import EMBEDDING_GRIDS, Plan, PlanRow
from neoquant.quantization.quantize import plan, quantize
from neoquant.quantization.recipe import Recipe
from neoquant.quantizers import Nearest

MakeModel = Callable[..., Path]
HEAD = "lm_head.weight"
IDS = torch.tensor([[5, 9, 258, 0], [7, 7, 1, 30]])


def untied(make_model: MakeModel) -> Path:
    """The tiny model with a head of its own."""
    return make_model("untied", tie_word_embeddings=False)


def row_of(planned: Plan, name: str) -> PlanRow:
    return next(row for row in planned.rows if row.name == name)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("embeddings", EMBEDDING_GRIDS)
def test_logits_are_those_of_the_rounded_embedding(
    make_model: MakeModel, tmp_path: Path, embeddings: Any, tied: bool
) -> None:
    """Against the same network with the table, and the head, replaced by what their codes stand for."""
    source = make_model() if tied else untied(make_model)
    for choice in ("keep", embeddings):
        quantize(source, tmp_path / choice, Recipe.simple(4, "nf4", format="neoquant", embeddings=choice))
    model = GPTNeoForCausalLM.from_pretrained(tmp_path / embeddings)
    assert isinstance(model.transformer.wte, QuantEmbedding) and isinstance(model.lm_head, QuantLinear)
    assert (model.lm_head is model.transformer.wte.table) == tied

    reference = GPTNeoForCausalLM.from_pretrained(tmp_path / "keep")
    tables = load_file(source / "model.safetensors")
    for module, name in ((reference.transformer.wte, EMBEDDING), (reference.lm_head, EMBEDDING if tied else HEAD)):
        rounded = Nearest().quantize(tables[name], EMBEDDING_GRIDS[embeddings]).dequantize(torch.float32)
        module.weight = torch.nn.Parameter(rounded, requires_grad=False)
    with torch.inference_mode():
        got, expected = model(IDS).logits, reference(IDS).logits
        assert torch.equal(got, model(IDS.int()).logits)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert model.generate(IDS, max_new_tokens=5, eos_token_id=[]).shape == (2, 9)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_saving_what_was_loaded_gives_the_same_tensors(make_model: MakeModel, tmp_path: Path, tied: bool) -> None:
    source = make_model() if tied else untied(make_model)
    quantize(source, tmp_path / "a", Recipe.simple(4, "nf4", embeddings="int8"))
    GPTNeoForCausalLM.from_pretrained(tmp_path / "a", dtype="auto").save_pretrained(tmp_path / "b")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in "ab")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_embedding_follows_the_models_type(make_model: MakeModel, tmp_path: Path) -> None:
    quantize(make_model(), tmp_path / "a", Recipe.simple(4, "nf4", embeddings="nf4"))
    model = GPTNeoModel.from_pretrained(tmp_path / "a")
    assert model.wte(IDS).dtype == torch.float32
    stored = model.wte.table.quantized
    model = model.to(torch.bfloat16)
    assert model.wte(IDS).dtype == model(IDS).last_hidden_state.dtype == torch.bfloat16
    assert model.wte.table.quantized.equals(stored)
    with pytest.raises(IndexError):
        model.wte(torch.tensor([259]))


@pytest.mark.parametrize("embeddings", EMBEDDING_GRIDS)
def test_sizes_are_foretold_and_told(make_model: MakeModel, tmp_path: Path, embeddings: Any) -> None:
    source = make_model(hidden_size=192, num_heads=4, vocab_size=1000)
    recipe = Recipe.simple(4, "nf4", embeddings=embeddings)
    planned, made = plan(source, recipe), quantize(source, tmp_path / "out", recipe)
    assert made.plan.format.name == "packed"
    assert planned.output_bytes == pytest.approx(made.output_bytes, rel=0.01)
    assert (
        planned.bits_per_weight_linears
        == plan(source, Recipe.simple(4, "nf4", format="neoquant")).bits_per_weight_linears
    )
    with open_checkpoint(source) as before, open_checkpoint(tmp_path / "out") as after:
        found = describe(after)
        assert found.parameters == describe(before).parameters
    assert found.bits_per_weight_model == pytest.approx(made.plan.bits_per_weight_model, abs=0.01)
    assert f"1 weight {embeddings}" in found.grids or embeddings == "nf4"
    assert "`transformer.wte` | 1 |" in (tmp_path / "out" / "README.md").read_text()


def test_what_each_format_does_with_the_embedding(make_model: MakeModel) -> None:
    """Ours holds it, and does so unless told otherwise; the others keep it, and refuse to be asked for more."""
    source = make_model(hidden_size=64, num_heads=4)
    for type, format, grid in (
        ("nf4", "bitsandbytes", None),
        ("affine", "gptq", None),
        ("nf4", "neoquant", make_grid(8, "int8")),
    ):
        assert row_of(plan(source, Recipe.simple(4, type, format=format)), EMBEDDING).grid == grid
        kept = plan(source, Recipe.simple(4, type, format=format, embeddings="keep"))
        assert row_of(kept, EMBEDDING).action == "keep"
        if grid is None:
            with pytest.raises(RecipeError, match='keeps embeddings in half precision, format = "neoquant" can'):
                plan(source, Recipe.simple(4, type, format=format, embeddings="int8"))
        chosen = plan(source, Recipe.simple(4, type, embeddings="nf4"))
        assert (chosen.format.name, row_of(chosen, EMBEDDING).grid) == ("packed", make_grid(4, "nf4"))
        assert any("keeps embeddings in half precision" in note for note in chosen.notes)


def test_a_rule_may_keep_the_embedding_but_not_against_the_recipes_own_word(tiny_model: Path) -> None:
    keep = ["*.wte"]
    planned = plan(tiny_model, Recipe.simple(4, "nf4", format="neoquant", keep=keep))
    assert row_of(planned, EMBEDDING).action == "keep"
    with pytest.raises(RecipeError, match='embeddings = "int8" finds none: a rule keeps it'):
        plan(tiny_model, Recipe.simple(4, "nf4", keep=keep, embeddings="int8"))


def test_a_tied_head_that_is_stored_alone_becomes_the_embedding(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model()
    tensors = load_file(source / "model.safetensors")
    quantize(source, tmp_path / "a", Recipe.simple(4, "nf4", embeddings="int8"))
    tensors[HEAD] = tensors.pop(EMBEDDING)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    quantize(source, tmp_path / "b", Recipe.simple(4, "nf4", embeddings="int8"))
    a, b = (load_file(tmp_path / folder / "model.safetensors") for folder in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert neoquant.GPTNeoForCausalLM.from_pretrained(tmp_path / "b")(IDS).logits.shape == (2, 4, 259)
