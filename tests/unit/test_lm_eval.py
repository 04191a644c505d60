"""lm-evaluation-harness runs neoquant's folders inside transformers, and measures what `neoquant eval` measures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import neoquant
from neoquant.demo import MODEL
from neoquant.evaluation import ModelInfo, Suite, evaluate
from neoquant.quantization.recipe import Recipe

harness = pytest.importorskip("lm_eval.models.huggingface")
instances = pytest.importorskip("lm_eval.api.instance")
pytest.importorskip("transformers")

from neoquant import transformers as inside  # noqa: E402  # it needs transformers

TEXTS = [path.read_text() for path in sorted(Path(neoquant.__file__).parent.glob("*.py"))[:3]]


@pytest.fixture
def every_method() -> Iterator[None]:
    """What `use_for` does, undone."""
    from transformers.quantizers import auto

    tables = (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    before = [dict(table) for table in tables]
    inside.use_for()
    yield
    for table, entries in zip(tables, before, strict=True):
        table.update(entries)


RECIPES: dict[str, str | Recipe] = {
    "neoquant": "mxfp4",
    "bitsandbytes": "nf4",
    "gptq": Recipe.simple(4, "affine", group_size=64, format="gptq"),
    "compressed-tensors": Recipe.simple(4, "affine", group_size=64, format="compressed-tensors"),
}


@pytest.mark.parametrize("format", RECIPES)
def test_bits_per_byte_are_neoquants(tmp_path: Path, every_method: None, format: str) -> None:
    neoquant.quantize(MODEL, tmp_path / "q", RECIPES[format])
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    model, tokenizer = neoquant.load(tmp_path / "q", dtype=torch.float32)
    suite = Suite(name="texts", data={"kind": "file", "path": str(file)})
    ours = evaluate(model, tokenizer, suite, describe=ModelInfo(name="q"))
    lm = harness.HFLM(pretrained=str(tmp_path / "q"), device="cpu", dtype="float32", batch_size=1)
    asked = [instances.Instance("loglikelihood_rolling", {}, (text,), 0) for text in TEXTS]
    nats = [-value for value in lm.loglikelihood_rolling(asked)]
    assert [unit.nats for unit in ours.units] == pytest.approx(nats, rel=1e-6)
    size = sum(len(text.encode()) for text in TEXTS)
    mine = sum(unit.nats for unit in ours.units)
    assert mine / math.log(2) / size == pytest.approx(sum(nats) / math.log(2) / size, rel=1e-6)
