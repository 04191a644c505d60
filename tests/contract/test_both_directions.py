"""Whole folders, both ways: transformers gives our logits from our folder, and we give its logits from its own.

Both compute in float32. `train()` makes bitsandbytes multiply exactly (see test_transformers.py); GPT-Neo without
dropout computes the same in either mode.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tiny_model

import neoquant
from neoquant.nn.linear import QuantLinear

transformers = pytest.importorskip("transformers")

RECIPES: dict[str, dict[str, Any]] = {
    "nf4": {"bits": 4, "type": "nf4"},
    "nf4 in blocks of 32 without double quantization": {"type": "nf4", "block_size": 32, "double_quant": False},
    "fp4": {"bits": 4, "type": "fp4"},
    "int8": {"bits": 8, "type": "int8"},
    "some kept": {"type": "nf4", "keep": ["*.mlp.c_proj", "transformer.h.0.*"]},
}
THEIRS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
    "some kept": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["lm_head", "c_proj"]},
}
IDS = torch.randint(0, 259, (2, 21), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["float16", "float32", "bfloat16"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / request.param
    return write_tiny_model(folder, hidden_size=64, num_heads=4, dtype=request.param)


def their_logits(folder: Path, **options: Any) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options)
    torch.nn.Module.float(model)  # their own .float() refuses a quantized model; this casts what is not quantized
    with torch.no_grad():
        logits: torch.Tensor = model.train()(IDS).logits
    return logits


def our_logits(folder: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error", neoquant.LoadWarning)
        model, _ = neoquant.load(folder, dtype=torch.float32)
    assert any(isinstance(module, QuantLinear) for module in model.modules())
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("options", RECIPES.values(), ids=RECIPES)
def test_transformers_gives_our_logits_from_our_folder(source: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    out = tmp_path / "out"
    neoquant.quantize(source, out, neoquant.Recipe.simple(**options))
    assert_close(their_logits(out), our_logits(out))


@pytest.mark.parametrize("options", THEIRS.values(), ids=THEIRS)
def test_we_give_their_logits_from_their_folder(source: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    quantization = transformers.BitsAndBytesConfig(**options)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=quantization, dtype="auto")
    model.save_pretrained(tmp_path)
    transformers.PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json")).save_pretrained(tmp_path)
    assert_close(our_logits(tmp_path), their_logits(tmp_path, dtype="auto"))  # transformers 4 takes float16 by itself


@pytest.mark.parametrize("options", RECIPES.values(), ids=RECIPES)
def test_a_quantized_model_is_saved_again_bit_for_bit(source: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Loading, saving and loading again rounds nothing a second time."""
    neoquant.quantize(source, tmp_path / "first", neoquant.Recipe.simple(**options))
    model, _ = neoquant.load(tmp_path / "first", dtype="auto")
    model.save_pretrained(tmp_path / "second")
    again = neoquant.GPTNeoForCausalLM.from_pretrained(tmp_path / "second", dtype="auto")
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            copy = again.get_submodule(name)
            assert isinstance(copy, QuantLinear)
            assert copy.quantized.equals(module.quantized)
    assert_close(their_logits(tmp_path / "second"), our_logits(tmp_path / "first"))
