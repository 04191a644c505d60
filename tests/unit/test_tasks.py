"""LAMBADA and WikiText-2, as lm-evaluation-harness and GPTQ's papers define them, against transformers."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import Bytes
from conftest import Cli

from neoquant.data.tasks import rejoin
from neoquant.errors import DataError
from neoquant.evaluation import EvaluatedModel, Evaluation, ModelInfo, Suite, compare, evaluate, load_suite

PASSAGES = [
    "he went to the bank to get",
    "it rained all day , so she took her umbrella",
    "to be or not to be, that was the longest passage of all of these by far be",
    "a b",
]
WIKI = "".join(
    f" {line}\n"
    for line in (
        *("", "= First title = ", ""),
        "The 4 @,@ 000 men ( of whom 3 @.@ 5 % fled ) were the king 's own .",
        *("", "= = Section = = ", ""),
        '" Quoted " words ; and more : all of it .',
        *("", "= Second title = ", "", "Some [ text ] here ."),
    )
)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    from transformers import GPTNeoForCausalLM

    return GPTNeoForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager").eval()


def log_p(model: Any, ids: list[int]) -> torch.Tensor:
    """log p[position, token] of what follows each position."""
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def lambada(model: Any, text: str, context: int) -> tuple[float, bool]:
    """log p of the last word, and whether decoding greedily gives it."""
    tokenizer = Bytes()
    word = " " + text.split(" ")[-1]
    before, target = tokenizer.encode(" ".join(text.split(" ")[:-1])), tokenizer.encode(word)
    ids = (before + target)[-context - 1 :]
    table = log_p(model, ids[:-1])[-len(target) :]
    picked = table.gather(-1, torch.tensor(target)[:, None])
    return float(picked.sum()), bool((table.argmax(-1) == torch.tensor(target)).all())


def lambada_suite(tmp_path: Path) -> Suite:
    path = tmp_path / "lambada_test.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in PASSAGES))
    return load_suite("lambada").override(file=path)


def test_lambada(model: Any, tmp_path: Path) -> None:
    suite = lambada_suite(tmp_path)
    assert suite.name == "lambada" and suite.protocol == "last-word"
    result = evaluate(model, Bytes(), suite, describe=ModelInfo(name="a"))
    expected = [lambada(model, text, 32) for text in PASSAGES]
    assert [unit.nats for unit in result.units] == pytest.approx([-nats for nats, _ in expected], rel=1e-5)
    assert [unit.correct for unit in result.units] == [right for _, right in expected]
    assert result.total.accuracy == sum(right for _, right in expected) / len(PASSAGES)
    perplexity = math.exp(-sum(nats for nats, _ in expected) / len(PASSAGES))
    assert result.total.word_perplexity == pytest.approx(perplexity, rel=1e-5)
    assert result.total.tokens == sum(len(" " + text.split(" ")[-1]) for text in PASSAGES)
    assert Evaluation.from_json(result.to_json()) == result


def test_lambada_counts_what_is_found(model: Any, tmp_path: Path) -> None:
    """Passages that end as the model itself would end them are all found; another model's changes are paired."""
    import copy

    texts = []
    while len(texts) < 8:
        passage = f"some words {len(texts)}"
        ids = [*Bytes().encode(passage + " ")]
        token = int(log_p(model, ids)[-1].argmax())
        texts.append(passage + " " + (chr(token - 1) if 33 <= token - 1 < 127 else "x"))
    path = tmp_path / "found.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.transformer.wte.weight += 0.3 * torch.randn(259, 24, generator=torch.Generator().manual_seed(0))
    evaluated = [EvaluatedModel(m, ModelInfo(name=n)) for m, n in ((model, "a"), (other, "b"))]
    result = compare(evaluated[0], evaluated[1:], Bytes(), load_suite("lambada").override(file=path))
    (candidate,) = result.candidates
    a, b = result.reference.total.accuracy, candidate.evaluation.total.accuracy
    assert a is not None and b is not None and candidate.total.accuracy == pytest.approx(b - a)
    for unit, text in zip(candidate.evaluation.units, texts, strict=True):
        assert unit.correct == lambada(other, text, 32)[1]


def test_wikitext_rolling_and_joined(model: Any, tmp_path: Path, cli: Cli, tiny_model: Path) -> None:
    raw = tmp_path / "wiki.test.raw"
    raw.write_text(WIKI)
    suite = load_suite("wikitext2").override(file=raw)
    result = evaluate(model, Bytes(), suite, describe=ModelInfo(name="a"))
    first, second = re.split(r"(?= = Second title = )", WIKI)
    articles = [first[first.index(" = First") :], second]
    assert result.total.bytes == sum(len(article.encode()) for article in articles)
    assert result.total.words == sum(len(re.split(r"\s+", article)) for article in articles)
    nats = 0.0
    for article in articles:
        ids = [0, *Bytes().encode(rejoin(article))]
        for done in range(1, len(ids), 32):
            end = min(done + 32, len(ids))
            window = ids[max(0, end - 33) : end]
            scored = end - done
            table = log_p(model, window[:-1])[-scored:]
            nats -= float(table.gather(-1, torch.tensor(window[-scored:])[:, None]).sum())
    assert result.total.nats == pytest.approx(nats, rel=1e-5)
    assert result.total.word_perplexity == pytest.approx(math.exp(nats / (result.total.words or 1)), rel=1e-5)

    rows = [f"{line}\n" if line.strip() else "" for line in WIKI.split("\n")[:-1]]
    ids = Bytes().encode("\n\n".join(rows))
    windows = [ids[start : start + 32] for start in range(0, len(ids) - 31, 32)]
    nats = -sum(float(log_p(model, w)[:-1].gather(-1, torch.tensor(w[1:])[:, None]).sum()) for w in windows)
    joined = evaluate(model, Bytes(), suite.override(protocol="joined"), describe=ModelInfo(name="a"))
    assert joined.total.nats == pytest.approx(nats, rel=1e-5) and joined.total.tokens == 31 * len(windows)
    jsonl = tmp_path / "rows.jsonl"
    jsonl.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    for protocol, expected in (("rolling", result), ("joined", joined)):
        by_rows = suite.override(file=jsonl, protocol=protocol)  # as the hub has it
        assert evaluate(model, Bytes(), by_rows, describe=ModelInfo(name="a")).total.nats == expected.total.nats
    shown = cli("eval", tiny_model, "--suite", "wikitext2", "--data", raw, "--documents", "1")
    assert shown.code == 0 and "word ppl" in shown.out and "suite wikitext2" in shown.out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            " The 4 @,@ 000 men ( of whom 3 @.@ 5 fled ) were the king 's own . \n",
            " The 4,000 men (of whom 3.5 fled) were the king's own.\n",
        ),
        (' " A " = = B = = \n well @-@ known ; it ! \n', ' "A" == B ==\nwell-known; it!\n'),
        ("30 ° of N [ x ] , s ' ?", "30°of 1 [x], s' ?"),
    ],
)
def test_rejoined_by_hand(text: str, expected: str) -> None:
    assert rejoin(text) == expected


def test_a_passage_of_one_word_is_refused(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "short.jsonl"
    path.write_text('{"text": "one"}')
    with pytest.raises(DataError, match="line 1: no last word after a space"):
        evaluate(model, Bytes(), load_suite("lambada").override(file=path), describe=ModelInfo(name="a"))
