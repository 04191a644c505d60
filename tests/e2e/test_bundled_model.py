"""The model that comes with neoquant: small, truly trained, and sensitive to quantization in the order of the bits."""

from __future__ import annotations

import ast
import lzma
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

import neoquant
from neoquant.data.documents import stdlib_documents
from neoquant.demo import MODEL
from neoquant.evaluation import Comparison, EvaluatedModel, ModelInfo, load_suite
from neoquant.evaluation import compare as compare_models

BITS_PER_BYTE = 8


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """int8, NF4 and FP4 copies against the model, on one held-out document of each of two subsets."""
    folder = tmp_path_factory.mktemp("demo")
    evaluated = []
    for kind in (None, "int8", "nf4", "fp4"):
        source = MODEL
        if kind is not None:
            source = folder / kind
            neoquant.quantize(None, source, neoquant.Recipe.load(kind))
        model, tokenizer = neoquant.load(source)
        evaluated.append(EvaluatedModel(model, ModelInfo(name=kind or "fp16")))
    suite = load_suite("demo").override(subsets=("formats", "text"), documents=1)
    return compare_models(evaluated[0], evaluated[1:], tokenizer, suite)


def test_its_shape_is_what_the_tools_must_deal_with() -> None:
    config = neoquant.GPTNeoConfig.from_pretrained(MODEL)
    assert set(config.attention_layers) == {"global", "local"}
    assert config.window_size < config.max_position_embeddings >= 512
    assert (MODEL / "model.safetensors").stat().st_size <= 16e6
    assert neoquant.load_tokenizer(MODEL).vocab_size == config.vocab_size


def test_it_reads_python_far_better_than_a_compressor(comparison: Comparison) -> None:
    """xz sees whole files, and both are scored on text that the model was not trained on."""
    for score in comparison.reference.subsets:
        text = b"".join(
            document.text.encode()
            for document in stdlib_documents({"formats": ["csv"], "text": ["calendar"]}, {})
            if document.subset == score.subset
        )
        compressed = BITS_PER_BYTE * len(lzma.compress(text, preset=9)) / len(text)
        assert score.bits_per_byte < 0.75 * compressed


def test_it_loses_more_the_fewer_the_bits(comparison: Comparison) -> None:
    int8, nf4, fp4 = (candidate.total for candidate in comparison.candidates)
    assert 0 < int8.kl < nf4.kl / 20 < fp4.kl / 20
    assert int8.agreement > nf4.agreement > fp4.agreement
    assert abs(int8.nats_per_token) < nf4.nats_per_token < fp4.nats_per_token


def test_what_it_writes_looks_like_python() -> None:
    """Greedily continued, an unfinished function goes on with lines that Python can parse as its body."""
    model, tokenizer = neoquant.load()
    prompt = "def read(self, path):\n    with open(path) as file:\n        "
    text = neoquant.generate_text(model, tokenizer, prompt, max_new_tokens=24)
    first = text.split("\n")[0]
    ast.parse(prompt + first)
    assert first.strip()


def test_loading_it_twice_gives_the_same() -> None:
    (first, _), (second, _) = neoquant.load(), neoquant.load()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(first(ids).logits, second(ids).logits)


@pytest.mark.parametrize("script", ["tables.py", "charts.py"])
def test_what_is_published_is_what_the_results_say(script: str) -> None:
    done = subprocess.run(
        [sys.executable, REPOSITORY / "eval" / script, "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_its_card_says_how_it_was_made() -> None:
    card = Path(MODEL / "README.md").read_text("utf-8")
    assert "eval/demo_model/train.py" in card and "standard library" in card
