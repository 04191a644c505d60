"""On trained weights: every class gives transformers' outputs on padded batches, and generation its ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import neoquant

pytestmark = pytest.mark.real_data

TEXTS = ["The committee decided on", "def __init__(self, name):\n", "In 1987, a"]
HEADS = ("", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


@pytest.fixture(scope="module")
def folder(real_data: Path) -> Path:
    return real_data / "models" / "neo-8m"


def pair(folder: Path, head: str, tmp_path: Path) -> tuple[Any, Any]:
    """Theirs, with a head that is drawn if need be, and ours of the same weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    cls = getattr(transformers, f"GPTNeo{head or 'Model'}")
    theirs = cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", pad_token_id=1).eval()
    theirs.save_pretrained(tmp_path)
    return theirs, getattr(neoquant, f"AutoModel{head}").from_pretrained(tmp_path, dtype="float32", device_map="cpu")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("head", HEADS)
def test_padded_batches_give_transformers_outputs(folder: Path, tmp_path: Path, head: str, side: str) -> None:
    theirs, ours = pair(folder, head, tmp_path)
    tokenizer = neoquant.AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side, tokenizer.pad_token = side, tokenizer.convert_ids_to_tokens([1])[0]
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        got, expected = ours(**inputs), theirs(**inputs)
    compared = 0
    for name in ("last_hidden_state", "logits", "start_logits", "end_logits"):
        if name in expected:
            a, b = getattr(got, name), expected[name]
            if a.shape[:2] == inputs.attention_mask.shape:
                a, b = (tensor[inputs.attention_mask.bool()] for tensor in (a, b))
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()
            compared += 1
    assert compared


def test_continuations_are_transformers(folder: Path, tmp_path: Path) -> None:
    theirs, ours = pair(folder, "ForCausalLM", tmp_path)
    tokenizer = neoquant.AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    for options in ({"do_sample": False}, {"do_sample": True, "top_p": 0.9, "temperature": 0.8}):
        found = []
        for model in (ours, theirs):
            torch.manual_seed(7)
            found.append(model.generate(**inputs, max_new_tokens=24, pad_token_id=0, **options).tolist())
        assert found[0] == found[1]


def test_texts_become_transformers_ids(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours, theirs = (auto.from_pretrained(folder) for auto in (neoquant.AutoTokenizer, transformers.AutoTokenizer))
    texts = [*TEXTS, "", " naïve\n\n\tcafé ☕", "<|endoftext|>a"]
    assert ours(texts)["input_ids"] == theirs(texts)["input_ids"]
    assert ours.batch_decode(ours(texts)["input_ids"]) == texts
