"""An embedding that a quantized checkpoint keeps in half precision stays so in memory, and computes as ever."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from switch import forced
from torch import nn

from neoquant import GPTNeoForCausalLM, GPTNeoForSequenceClassification, native, quantize
from neoquant.checkpoint import open_checkpoint
from neoquant.nn.linear import StoredLinear
from neoquant.quantization.recipe import Recipe

MakeModel = Callable[..., Path]
IDS = torch.arange(1, 9)[None]
HALVES = [torch.float16, torch.bfloat16]
TABLE = "transformer.wte.weight"
needs_native = pytest.mark.skipif(native.active().library is None, reason=native.active().reason)


@needs_native
@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 200)), rows=st.integers(1, 12), dtype=st.sampled_from(HALVES),
    biased=st.booleans(),
)  # fmt: skip
def test_products_are_those_of_the_cast_weight(
    shape: tuple[int, int], rows: int, dtype: torch.dtype, biased: bool
) -> None:
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]) if biased else None
    x = torch.randn(1, rows, shape[1])
    layer = StoredLinear(nn.Parameter(weight), None if bias is None else nn.Parameter(bias))
    expected = nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    with torch.inference_mode():
        found = layer(x)
        assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-4)
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad[0, 0].double(), weight.double().sum(0), rtol=1e-4, atol=1e-4)
    assert layer(x.to(dtype)).dtype == dtype


@needs_native
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_is_kept_in_half_precision_stays_so(make_model: MakeModel, tmp_path: Path, dtype: str, tied: bool) -> None:
    source = make_model(dtype=dtype, tie_word_embeddings=tied)
    quantize(source, tmp_path / "out", Recipe.simple(4, "nf4"))
    model = GPTNeoForCausalLM.from_pretrained(tmp_path / "out", dtype="float32", device_map="cpu")
    head, table = model.lm_head, model.get_parameter(TABLE)
    assert isinstance(head, StoredLinear) and head.weight.dtype == table.dtype == getattr(torch, dtype)
    assert (head.weight is table) == tied and model.dtype == torch.float32
    with forced("off"):
        whole = GPTNeoForCausalLM.from_pretrained(tmp_path / "out", dtype="float32", device_map="cpu")
    assert type(whole.lm_head) is nn.Linear and whole.get_parameter(TABLE).dtype == torch.float32
    with torch.inference_mode():
        assert torch.allclose(model(IDS).logits, whole(IDS).logits, rtol=1e-4, atol=1e-4)
        rows = model.get_submodule("transformer.wte")(IDS)
        assert rows.dtype == torch.float32 and torch.equal(rows, whole.get_submodule("transformer.wte")(IDS))
        assert torch.equal(model.generate(IDS, max_new_tokens=9), whole.generate(IDS, max_new_tokens=9))
        loss = model.bfloat16()(IDS, labels=IDS).loss
    assert loss is not None and loss.isfinite()
    model.save_pretrained(tmp_path / "again")
    with open_checkpoint(tmp_path / "again") as saved, open_checkpoint(source) as first:
        assert torch.equal(saved.read(TABLE).float(), first.read(TABLE).bfloat16().float())


@needs_native
def test_saving_writes_what_was_stored(make_model: MakeModel, tmp_path: Path) -> None:
    quantize(make_model(), tmp_path / "out", Recipe.simple(4, "nf4"))
    GPTNeoForCausalLM.from_pretrained(tmp_path / "out", dtype="float32", device_map="cpu").save_pretrained(
        tmp_path / "again"
    )
    with open_checkpoint(tmp_path / "again") as saved, open_checkpoint(tmp_path / "out") as first:
        assert saved.headers[TABLE].dtype == torch.float16
        assert torch.equal(saved.read(TABLE), first.read(TABLE))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_types_are_cast_as_ever(make_model: MakeModel, tmp_path: Path, dtype: str) -> None:
    quantize(make_model(dtype="float32"), tmp_path / "out", Recipe.simple(4, "nf4"))
    model = GPTNeoForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype, device_map="cpu")
    assert type(model.lm_head) is nn.Linear and model.get_parameter(TABLE).dtype == getattr(torch, dtype)


def test_plain_models_may_be_trained(make_model: MakeModel) -> None:
    """So their weights are cast, all of them."""
    model = GPTNeoForCausalLM.from_pretrained(make_model(), dtype="float32", device_map="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@needs_native
def test_other_heads_have_the_embedding_alone(make_model: MakeModel, tmp_path: Path) -> None:
    quantize(make_model(), tmp_path / "out", Recipe.simple(4, "nf4"))
    with pytest.warns(UserWarning, match="no weights for"):
        model = GPTNeoForSequenceClassification.from_pretrained(tmp_path / "out", dtype="float32", device_map="cpu")
    assert model.get_parameter(TABLE).dtype == torch.float16
    with torch.inference_mode():
        assert model(IDS).logits.dtype == torch.float32


def test_another_width_is_refused_as_ever() -> None:
    layer = StoredLinear(nn.Parameter(torch.randn(5, 8).half()))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="shapes"):
        layer(torch.randn(2, 7))
