"""Rolling losses against lm-evaluation-harness itself, on trained weights and the Pile's text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from neoquant.evaluation import ModelInfo, Suite, evaluate
from neoquant.loading.pretrained import load

# Line of the sample -> nats, from lm_eval 0.4.13's HFLM(...).loglikelihood_rolling in float32 (transformers 5.23).
# Lines 4, 60 and 77 are longer than the model's context of 1,024 tokens.
LM_EVAL = {
    4: 22397.1640625,
    17: 1586.4710693359375,
    20: 1384.89794921875,
    21: 786.5098876953125,
    60: 14661.846923828125,
    64: 130.47158813476562,
    77: 22009.857543945312,
    80: 162.0370635986328,
    86: 1703.6207275390625,
    87: 330.796875,
}


@pytest.mark.real_data
def test_rolling_equals_lm_evaluation_harness(real_data: Path, tmp_path: Path) -> None:
    sample = (real_data / "data" / "pile" / "pile-test-sample.jsonl").read_bytes().split(b"\n")
    chosen = tmp_path / "chosen.jsonl"
    chosen.write_bytes(b"\n".join(sample[line - 1] for line in LM_EVAL))
    model, tokenizer = load(real_data / "models" / "neo-8m", dtype=torch.float32, device="cpu")
    suite = Suite(name="sample", data={"kind": "file", "path": str(chosen)})
    result = evaluate(model, tokenizer, suite, describe=ModelInfo(name="neo-8m"))
    assert [unit.nats for unit in result.units] == pytest.approx(list(LM_EVAL.values()), rel=1e-6)
