"""Pipelines return what transformers' return on the same files; question answering, which it has dropped, what its
definition says on transformers' logits."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import neoquant
from neoquant.demo import MODEL
from neoquant.errors import ContextError, RequestError
from neoquant.quantization.convert import convert

transformers = pytest.importorskip("transformers")

PROMPTS = ["def mean(values):", "import", "class Stack:\n"]
SENTENCES = ["The cat sat on  a mat, in Oslo.", "a", "Hello <b> & good-bye", "x" * 20]


def with_head(make_model: Callable[..., Path], head: str, seed: int = 0, **changes: Any) -> Path:
    """A tiny random checkpoint with a head whose outputs differ visibly, which transformers wrote."""
    torch.manual_seed(seed)
    folder = make_model(f"plain{head}{seed}", seed=seed, dtype="float32", max_position_embeddings=64, **changes)
    model = getattr(transformers, f"GPTNeoFor{head}").from_pretrained(folder)
    for name in ("score", "classifier", "qa_outputs"):
        if hasattr(model, name):
            torch.nn.init.normal_(getattr(model, name).weight, std=1.0)
    whole = folder.parent / f"{head}{seed}"
    model.save_pretrained(whole)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (whole / name).write_bytes((folder / name).read_bytes())
    return whole


def pair(task: str, folder: Path, **options: Any) -> tuple[Any, Any]:
    """Ours and theirs. Padding needs a token, which theirs lacks."""
    ours = neoquant.pipeline(task, folder, dtype=torch.float32, device=-1, **options)
    theirs = transformers.pipeline(task, str(folder), dtype=torch.float32, device="cpu", **options)
    theirs.tokenizer.pad_token = theirs.tokenizer.eos_token
    return ours, theirs


def near(value: Any) -> Any:
    """Floats compared as such, everything else exactly."""
    if isinstance(value, dict):
        return {key: near(item) for key, item in value.items()}
    if isinstance(value, list):
        return [near(item) for item in value]
    return pytest.approx(float(value), rel=1e-4) if isinstance(value, float) or hasattr(value, "dtype") else value


@pytest.fixture(scope="module")
def generators() -> tuple[Any, Any]:
    return pair("text-generation", MODEL)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "min_length": 50, "max_new_tokens": 60},
        {"max_new_tokens": 12, "do_sample": False},
        {"max_length": 20, "do_sample": False, "return_full_text": False},
        {"max_new_tokens": 9, "do_sample": False, "return_tensors": True},
        {"max_new_tokens": 9, "num_return_sequences": 2, "temperature": 1.5, "top_p": 0.9},
        {"max_new_tokens": 30, "do_sample": False, "stop_sequence": "\n", "skip_special_tokens": False},
        {"max_new_tokens": 9, "do_sample": False, "prefix": "x = 1\n"},
    ],
)
def test_generated_text_is_transformers(generators: tuple[Any, Any], options: dict[str, Any]) -> None:
    ours, theirs = generators
    torch.manual_seed(11)
    expected = theirs(PROMPTS[0], **options)
    torch.manual_seed(11)
    assert ours(PROMPTS[0], **options) == expected
    if options.get("do_sample") is False and "stop_sequence" not in options:
        assert ours(PROMPTS, **options) == theirs(PROMPTS, **options)
        if "return_tensors" not in options:  # padded rows go with their padding
            assert ours(PROMPTS, batch_size=3, **options) == theirs(PROMPTS, batch_size=3, **options)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kind", [list, lambda texts: (text for text in texts)], ids=["list", "generator"])
def test_samples_of_several_texts_are_transformers(generators: tuple[Any, Any], batch_size: int, kind: Any) -> None:
    made = []
    for generator in generators:
        torch.manual_seed(12)
        results = generator(kind(PROMPTS), batch_size=batch_size, max_new_tokens=8, temperature=1.3)
        made.append([*results, torch.rand(1).item()])
    assert made[0] == made[1]


def test_generators_are_answered_as_they_come(generators: tuple[Any, Any]) -> None:
    drawn: list[str] = []

    def texts() -> Iterator[str]:
        for prompt in PROMPTS:
            drawn.append(prompt)
            yield prompt

    results = generators[0](texts(), batch_size=2, max_new_tokens=3, do_sample=False)
    assert not drawn
    first = next(results)
    assert len(drawn) == 2
    assert [first, *results] == generators[0](PROMPTS, max_new_tokens=3, do_sample=False)


def test_text_can_be_streamed(generators: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    ours = generators[0]
    streamer = neoquant.TextStreamer(ours.tokenizer)
    (result,) = ours(PROMPTS[0], max_new_tokens=12, do_sample=False, streamer=streamer)
    assert capsys.readouterr().out == result["generated_text"] + "\n"


def test_an_empty_text_begins_at_the_beginning(generators: tuple[Any, Any]) -> None:
    ours, theirs = generators
    options = {"max_new_tokens": 6, "do_sample": False}
    assert ours("", **options) == theirs("", **options)


def test_what_a_folder_says_counts_before_the_defaults(make_model: Callable[..., Path]) -> None:
    folder = make_model(dtype="float32")
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "max_length": 9, "eos_token_id": 0}))
    ours, theirs = pair("text-generation", folder)
    assert ours("abc") == theirs("abc")


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("problem", [None, "regression", "multi_label_classification"])
def test_classified_texts_are_transformers(make_model: Callable[..., Path], labels: int, problem: str | None) -> None:
    names = {str(number): f"kind{number}" for number in range(labels)}
    folder = with_head(make_model, "SequenceClassification", id2label=names, pad_token_id=0, problem_type=problem)
    ours, theirs = pair("text-classification", folder)
    texts = SENTENCES[:3]
    for options in ({}, {"top_k": 2}, {"top_k": None}, {"function_to_apply": "none"}, {"function_to_apply": "sigmoid"}):
        assert ours(texts[0], **options) == near(theirs(texts[0], **options))
        assert ours(texts, **options) == near(theirs(texts, **options))
        assert ours(texts, batch_size=2, **options) == near(theirs(texts, batch_size=2, **options))
    two = {"text": "one", "text_pair": " two"}
    assert ours(two) == near(theirs(two))
    assert ours([two, two]) == near(theirs([two, two]))
    cut = {"truncation": True, "max_length": 5}
    assert ours(texts, **cut) == near(theirs(texts, **cut))


NAMES = {"0": "O", "1": "B-PER", "2": "I-PER", "3": "B-LOC", "4": "I-LOC"}


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
@pytest.mark.parametrize("seed", [0, 1])
def test_labelled_tokens_are_transformers(make_model: Callable[..., Path], strategy: str, seed: int) -> None:
    folder = with_head(
        make_model, "TokenClassification", seed, id2label=NAMES, label2id={v: int(k) for k, v in NAMES.items()}
    )
    ours, theirs = pair("token-classification", folder, aggregation_strategy=strategy)
    for options in ({}, {"ignore_labels": []}, {"ignore_labels": ["PER", "I-PER"]}):
        assert ours(SENTENCES[0], **options) == near(theirs(SENTENCES[0], **options))
        assert ours(SENTENCES, **options) == near(theirs(SENTENCES, **options))
        assert ours(SENTENCES, batch_size=3, **options) == near(theirs(SENTENCES, batch_size=3, **options))


@pytest.mark.parametrize("stride", [0, 5])
def test_long_texts_are_labelled_in_overlapping_pieces(make_model: Callable[..., Path], stride: int) -> None:
    folder = with_head(make_model, "TokenClassification", 3, id2label=NAMES)
    said = json.loads((folder / "tokenizer_config.json").read_text()) | {"model_max_length": 20}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    ours, theirs = pair("token-classification", folder, aggregation_strategy="simple", stride=stride)
    text = " ".join(SENTENCES)
    assert ours(text, ignore_labels=[]) == near(theirs(text, ignore_labels=[]))
    with pytest.raises(ContextError, match="tokens, and the context 20: pass stride="):
        neoquant.pipeline("ner", folder)(text)


def answers(folder: Path, question: str, context: str, longest: int) -> list[tuple[float, int, int]]:
    """Every stretch with its probability, by the definition, from transformers' logits. One token a byte here."""
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    before = tokenizer(question).input_ids
    inside = tokenizer(context).input_ids
    with torch.no_grad():
        out = model(torch.tensor([before + inside]))
    weights = []
    for logits in (out.start_logits[0], out.end_logits[0]):
        exps = [math.exp(value) for value in logits[len(before) :].double().tolist()]
        weights.append([value / sum(exps) for value in exps])
    spans = [
        (weights[0][i] * weights[1][j], i, j + 1)
        for i in range(len(inside))
        for j in range(i, min(len(inside), i + longest))
    ]
    return sorted(spans, reverse=True)


def added_up(spans: list[tuple[float, int, int]], context: str) -> list[dict[str, Any]]:
    """Those of one text together, the first of which says where; the likeliest first."""
    found: dict[str, list[Any]] = {}
    for score, start, end in spans:
        found.setdefault(context[start:end].lower(), [0.0, start, end])[0] += score
    return [
        near({"score": score, "start": start, "end": end, "answer": context[start:end]})
        for score, start, end in sorted(found.values(), key=lambda each: -each[0])
    ]


@pytest.mark.parametrize("longest", [1, 4, 15])
def test_answers_are_the_likeliest_stretches(make_model: Callable[..., Path], longest: int) -> None:
    folder = with_head(make_model, "QuestionAnswering")
    question, context = "Who sat?", "The cat sat on the mat."
    expected = answers(folder, question, context, longest)
    ours = neoquant.pipeline("question-answering", folder, device="cpu", align_to_words=False)
    best = ours(question=question, context=context, max_answer_len=longest)
    score, start, end = expected[0]
    assert best == near({"score": score, "start": start, "end": end, "answer": context[start:end]})
    several = ours({"question": question, "context": context}, max_answer_len=longest, top_k=4)
    assert several == added_up(expected[:4], context)
    both = [{"question": question, "context": context}, {"question": "", "context": "Oslo"}]
    assert ours(both, max_answer_len=longest, batch_size=2) == [
        near(best), near(ours(both[1], max_answer_len=longest))
    ]  # fmt: skip


def test_long_contexts_are_searched_in_chunks(make_model: Callable[..., Path]) -> None:
    folder = with_head(make_model, "QuestionAnswering", 2)
    question, context = "Q?", "".join(chr(97 + number % 26) for number in range(150))
    options = {"max_seq_len": 40, "doc_stride": 10, "max_question_len": 5, "top_k": 3, "align_to_words": False}
    found: list[tuple[float, int, int]] = []
    for first in range(0, 150, 28):  # 40 less two of the question, less ten that overlap
        part = context[first : first + 38]
        found += [(score, first + i, first + j) for score, i, j in answers(folder, question, part, 15)[:3]]
        if first + 38 >= 150:
            break
    expected = added_up(found, context)[:3]
    got = neoquant.pipeline("question-answering", folder)(question=question, context=context, **options)
    assert got == expected


@pytest.mark.parametrize("top_k", [1, 3])
def test_answers_are_whole_words(make_model: Callable[..., Path], top_k: int) -> None:
    """As transformers 4.57 does: candidates are widened to their words, and those of one text are added up."""
    folder = with_head(make_model, "QuestionAnswering", 3)
    question, context = "Who sat?", "The cat sat on the mat; a Cat and the dog sat, too."
    words = [match.span() for match in re.finditer(r" ?\w+| ?[^\w\s]+", context)]

    def word(place: int) -> tuple[int, int]:
        """The word of a character; GPT-2's begin with the space before."""
        return next((start, end) for start, end in words if place < end)

    found = answers(folder, question, context, 15)[: 2 * top_k + 10]
    expected = added_up([(score, word(i)[0], word(j - 1)[1]) for score, i, j in found], context)[:top_k]
    got = neoquant.pipeline("question-answering", folder)(question=question, context=context, top_k=top_k)
    assert (got if top_k > 1 else [got]) == expected


def test_questions_may_be_lists(make_model: Callable[..., Path]) -> None:
    ours = neoquant.pipeline("question-answering", with_head(make_model, "QuestionAnswering"))
    questions, contexts = ["Who?", "Where?"], ["The cat sat.", "In Oslo, the mat."]
    singles = [ours(question=q, context=c) for q, c in zip(questions, contexts, strict=True)]
    assert ours(question=questions, context=contexts) == singles
    assert ours(question=questions, context=contexts[0])[0] == singles[0]
    with pytest.raises(RequestError, match="2 questions and 1 contexts are given"):
        ours(question=questions, context=contexts[:1])


def test_there_may_be_no_answer(make_model: Callable[..., Path]) -> None:
    folder = with_head(make_model, "QuestionAnswering", 1)
    model = neoquant.AutoModelForQuestionAnswering.from_pretrained(folder)
    with torch.no_grad():
        model.qa_outputs.weight.zero_()
    ours = neoquant.pipeline("question-answering", model, tokenizer=folder, top_k=200, align_to_words=False)
    got = ours(question="ab", context="cde", handle_impossible_answer=True)
    uniform = 1 / 16  # the first token, and three of the context, all alike
    assert {"score": uniform, "start": 0, "end": 0, "answer": ""} in got
    assert [one["score"] for one in got[:7]] == [pytest.approx(uniform)] * 7


def test_a_model_that_is_loaded_serves_as_well() -> None:
    model, tokenizer = neoquant.load()
    ours = neoquant.pipeline("text-generation", model, tokenizer=tokenizer, dtype=torch.float32)
    assert ours("import", max_new_tokens=2, do_sample=False) == neoquant.pipeline("text-generation")(
        "import", max_new_tokens=2, do_sample=False
    )


@pytest.mark.parametrize("task", ["text-generation", "text-classification", "token-classification"])
@pytest.mark.filterwarnings("ignore::neoquant.LoadWarning")
def test_quantized_weights_serve_as_plain_ones_do(tmp_path: Path, task: str) -> None:
    """Quantized on the way, or from a folder: the results are those of transformers on the values they stand for."""
    said = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    ours = neoquant.pipeline(task, MODEL, device="cpu", model_kwargs={"quantization_config": said})
    ours.model.save_pretrained(tmp_path / "nf4")
    ours.tokenizer.save_pretrained(tmp_path / "nf4")
    convert(tmp_path / "nf4", tmp_path / "plain", dequantize=True, dtype="float32")
    options = {"max_new_tokens": 8, "do_sample": False} if task == "text-generation" else {}
    theirs = transformers.pipeline(task, str(tmp_path / "plain"), dtype=torch.float32, device="cpu")
    assert ours(PROMPTS[0], **options) == near(theirs(PROMPTS[0], **options))
    again = neoquant.pipeline(task, tmp_path / "nf4", device="cpu")
    assert again(PROMPTS, **options) == ours(PROMPTS, **options)


@pytest.mark.parametrize(
    ("task", "inputs", "options", "message"),
    [
        ("translation", "a", {}, r"task is 'translation'; legal are text-generation, text-class"),
        ("text-generation", "a", {"max_new_token": 3}, "did you mean 'max_new_tokens'"),
        ("text-generation", [{"role": "user"}], {}, "GPT-Neo has no chats"),
        ("text-generation", "a", {"return_tensors": True, "return_text": True}, "return_tensors gives no text"),
        ("text-generation", ["a"], {"batch_size": 0}, "batch_size is 0"),
        ("text-classification", "", {}, "an empty text has no token"),
        ("text-classification", 3, {}, "texts, one or several, not of type int"),
        ("text-classification", [3], {}, "a text to classify is a string or"),
        ("text-classification", "a", {"function_to_apply": "relu"}, "legal are 'sigmoid'"),
        ("text-classification", ["a", "b"], {"batch_size": 2}, "a batch of 2 needs pad_token_id"),
        ("token-classification", "a", {"aggregation_strategy": "last"}, "legal are 'none', 'simple'"),
        ("token-classification", "a", {"stride": 3}, "needs an aggregation_strategy"),
        ("token-classification", "a", {"stride": 600, "aggregation_strategy": "max"}, "legal is 0 to 511"),
        ("question-answering", None, {"question": "a"}, "needs a question and a context"),
        ("question-answering", [{"text": "a"}], {}, "a question comes as"),
        ("question-answering", None, {"question": "a", "context": ""}, "the context is empty"),
        ("question-answering", None, {"question": "a", "context": "b", "top_k": 0}, "top_k is 0"),
        (
            "question-answering",
            None,
            {"question": "a", "context": "b", "doc_stride": 400},
            "legal is less than the 320",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::neoquant.LoadWarning")
def test_what_cannot_be_done_is_said(task: str, inputs: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        neoquant.pipeline(task)(inputs, **options)
