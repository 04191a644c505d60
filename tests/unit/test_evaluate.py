"""Evaluation and comparison against a scorer that reads one token at a time."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from byte_tokenizer import Bytes

import neoquant
from neoquant.errors import CheckpointError, DataError, RequestError
from neoquant.evaluation import Comparison, EvaluatedModel, Evaluation, ModelInfo, Suite, compare, evaluate
from neoquant.evaluation.corpus import byte_offsets, read_corpus
from neoquant.evaluation.scoring import batches, score_tokens
from neoquant.nn.linear import QuantLinear
from neoquant.progress import SILENT, Progress
from neoquant.quantization.recipe import Recipe

TEXTS = [
    ("code", "def f(x):\n    return x + 1\n" * 3),
    ("prose", "Größe: π ≈ 3, 漢字 and 😀 " * 4),
    ("code", ""),
    ("prose", "x"),
    ("code", "while True: pass"),
    ("prose", "A sentence, then another. " * 5),
]


class Models(NamedTuple):
    reference: Any
    other: Any


@pytest.fixture(scope="module")
def models(tiny_model: Path) -> Models:
    from transformers import GPTNeoForCausalLM

    reference = GPTNeoForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager").eval()
    other = copy.deepcopy(reference)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for block in other.transformer.h:
            weight = block.mlp.c_fc.weight
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return Models(reference, other)


@pytest.fixture
def make_suite(tmp_path: Path) -> Callable[..., Suite]:
    def make(texts: list[tuple[str, str]] = TEXTS, **fields: Any) -> Suite:
        path = tmp_path / "texts.jsonl"
        rows = [json.dumps({"text": text, "meta": {"pile_set_name": subset}}) for subset, text in texts]
        path.write_text("\n".join(rows))
        return Suite(name="mine", data={"kind": "file", "path": str(path)}, **fields)

    return make


def log_p(model: Any, context: list[int]) -> torch.Tensor:
    """log p of every next token after `context`, float64."""
    with torch.inference_mode():
        hidden = model.transformer(torch.tensor([context])).last_hidden_state[0, -1]
        return model.lm_head(hidden).double().log_softmax(-1)


class Brute(NamedTuple):
    tokens: int
    nats: float
    kl: float
    agreed: int


def brute_force(models: Models, predictions: list[tuple[list[int], int]]) -> Brute:
    """Sums over (context, next token), each scored alone: the other model's nats, KL, agreement."""
    nats = kl = 0.0
    agreed = 0
    for context, token in predictions:
        p, q = log_p(models.reference, context), log_p(models.other, context)
        nats -= float(q[token])
        kl += float((p.exp() * (p - q)).sum())
        agreed += int(p.argmax() == q.argmax())
    return Brute(len(predictions), nats, kl, agreed)


def rolling_predictions(text: str, context: int) -> list[tuple[list[int], int]]:
    """As lm-evaluation-harness defines it, token by token."""
    ids = [0, *Bytes().encode(text)]
    predictions = []
    for position in range(1, len(ids)):
        stretch = (position - 1) // context
        first = stretch * context
        if (stretch + 1) * context >= len(ids) - 1:  # the last window is filled up with context
            first = max(0, len(ids) - 1 - context)
        predictions.append((ids[first:position], ids[position]))
    return predictions


def joined_predictions(texts: list[str], context: int) -> list[tuple[list[int], int]]:
    ids = Bytes().encode("\n\n".join(texts))
    windows = [ids[start : start + context] for start in range(0, len(ids) - context + 1, context)]
    return [(window[:position], window[position]) for window in windows for position in range(1, context)]


def strided_predictions(texts: list[str], context: int, stride: int) -> list[tuple[list[int], int]]:
    ids = Bytes().encode("\n\n".join(texts))
    predictions = []
    for position in range(1, len(ids)):
        start = 0  # the first window that reaches this token
        while start + context <= position:
            start += stride
        predictions.append((ids[start:position], ids[position]))
    return predictions


def predictions(suite: Suite, subset: str) -> list[tuple[list[int], int]]:
    texts = [text for name, text in TEXTS if name == subset]
    assert suite.context is not None
    if suite.protocol == "rolling":
        return [p for text in texts for p in rolling_predictions(text, suite.context)]
    if suite.protocol == "joined":
        return joined_predictions(texts, suite.context)
    assert suite.stride is not None
    return strided_predictions(texts, suite.context, suite.stride)


@pytest.mark.parametrize(
    "protocol",
    [
        {"protocol": "rolling", "context": 32},
        {"protocol": "rolling", "context": 7},
        {"protocol": "joined", "context": 20},
        {"protocol": "strided", "context": 20, "stride": 6},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_equals_brute_force(
    models: Models, make_suite: Callable[..., Suite], protocol: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from neoquant.evaluation import scoring

    limits = scoring.BatchLimits(positions=64, rows=11)  # several batches, uneven pieces
    monkeypatch.setattr(scoring, "CPU_LIMITS", limits)
    suite = make_suite(**protocol)
    evaluated = [EvaluatedModel(model, ModelInfo(name=name)) for model, name in zip(models, "ab", strict=True)]
    result = compare(evaluated[0], evaluated[1:], Bytes(), suite)
    (candidate,) = result.candidates
    alone = evaluate(models.other, Bytes(), suite, describe=ModelInfo(name="b"))
    assert alone.total.nats == pytest.approx(candidate.evaluation.total.nats, rel=1e-6)
    total = Brute(0, 0, 0, 0)
    for change, score in zip(candidate.subsets, candidate.evaluation.subsets, strict=True):
        expected = brute_force(models, predictions(suite, score.subset))
        total = Brute(*(a + b for a, b in zip(total, expected, strict=True)))
        same_figures(score, change, expected)
    same_figures(candidate.evaluation.total, candidate.total, total)
    assert sum(unit.nats for unit in candidate.evaluation.units) == pytest.approx(total.nats, rel=1e-6)
    assert sum(unit.kl for unit in candidate.units) == pytest.approx(total.kl, rel=1e-5)
    assert candidate.total.nats_per_token == pytest.approx(
        candidate.evaluation.total.nats_per_token - result.reference.total.nats_per_token, rel=1e-6
    )


def same_figures(score: Any, change: Any, expected: Brute) -> None:
    assert score.subset == change.subset
    assert score.tokens == expected.tokens
    assert score.nats == pytest.approx(expected.nats, rel=1e-6)
    assert change.kl == pytest.approx(expected.kl / expected.tokens, rel=1e-5)
    assert change.agreement == pytest.approx(expected.agreed / expected.tokens)


@pytest.mark.parametrize(
    "recipe",
    [Recipe.simple(4, "nf4"), Recipe.simple(2, "affine", group_size=16, embeddings="keep")],
    ids=lambda recipe: recipe.name,
)
def test_quantized_checkpoints_equal_transformers(
    tiny_model: Path, tmp_path: Path, make_suite: Callable[..., Suite], recipe: Recipe
) -> None:
    """Folders as neoquant loads them, against transformers with their weights multiplied out, token by token."""
    from transformers import GPTNeoForCausalLM

    reference = GPTNeoForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager").eval()
    folder = neoquant.quantize(tiny_model, tmp_path / "quantized", recipe).folder
    ours = [neoquant.load(path, device="cpu")[0] for path in (tiny_model, folder)]
    other = copy.deepcopy(reference)
    with torch.no_grad():
        for name, module in ours[1].named_modules():
            if isinstance(module, QuantLinear):
                other.get_submodule(name).weight.copy_(module.quantized.dequantize(torch.float32))
    suite = make_suite(context=24)
    evaluated = [EvaluatedModel(model, ModelInfo(name=name)) for model, name in zip(ours, "ab", strict=True)]
    (candidate,) = compare(evaluated[0], evaluated[1:], Bytes(), suite).candidates
    for change, score in zip(candidate.subsets, candidate.evaluation.subsets, strict=True):
        same_figures(score, change, brute_force(Models(reference, other), predictions(suite, score.subset)))


@pytest.mark.parametrize("noise", [1e-3, 1e-2, 1.0])
def test_small_divergences_over_a_large_vocabulary(noise: float) -> None:
    """Two models' logits that nearly agree: 5e-7 nats apart for the smallest noise, against float64."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 50257, generator=generator) * 3 - 10
    y = x + 0.3 + noise * torch.randn(x.shape, generator=generator)
    targets = torch.randint(x.shape[1], (len(x),), generator=generator)
    reference, (nats, kl, top, probability, hit) = score_tokens(iter([x, y]), targets)
    p, q = x.double().log_softmax(-1), y.double().log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)
    assert (kl - expected).abs().max() < 5e-7
    assert float((kl - expected).mean()) == pytest.approx(0, abs=1e-7)
    assert torch.allclose(nats, -q.gather(-1, targets[:, None])[:, 0], rtol=0, atol=1e-6)
    for tops, logits in ((top, y), (reference.top, x)):
        assert torch.equal(tops, logits.argsort(-1, descending=True)[:, :3])
    assert torch.equal(hit, (y.argmax(-1) == targets).double())
    assert torch.allclose(probability, q.exp().gather(-1, top.long()), rtol=1e-5)


def test_rolling_counts_all_tokens_and_bytes(models: Models, make_suite: Callable[..., Suite]) -> None:
    result = evaluate(models.reference, Bytes(), make_suite(), describe=ModelInfo(name="a"))
    size = sum(len(text.encode()) for _, text in TEXTS)
    assert (result.total.documents, result.total.tokens, result.total.bytes) == (len(TEXTS), size, size)
    assert result.suite.context == 32  # the model's
    assert result.total.bits_per_byte == pytest.approx(result.total.nats_per_token / 0.6931471805599453)
    assert [score.subset for score in result.subsets] == ["code", "prose"]
    assert result.notes == ("1 document is empty, with nothing to score",)


def test_a_model_does_not_differ_from_itself(models: Models, make_suite: Callable[..., Suite]) -> None:
    same = EvaluatedModel(models.reference, ModelInfo(name="same"))
    result = compare(same, [same, same], Bytes(), make_suite())
    for candidate in result.candidates:
        change = candidate.total
        assert (change.nats_per_token, change.low, change.high) == (0, 0, 0)
        assert (change.agreement, change.agreement_error, change.kl) == (1, 0, 0)
        assert (change.agreement_low, change.agreement_high, change.kl_low, change.kl_high) == (1, 1, 0, 0)
        assert change.perplexity_ratio == 1


def test_a_single_document_has_no_interval(models: Models, make_suite: Callable[..., Suite]) -> None:
    evaluated = [EvaluatedModel(model, ModelInfo(name="x")) for model in models]
    result = compare(evaluated[0], evaluated[1:], Bytes(), make_suite([("only", "one text"), ("only", "")]))
    change = result.candidates[0].total
    assert (change.low, change.high, change.agreement_error) == (None, None, None)
    assert (change.kl_low, change.kl_high, change.agreement_low, change.agreement_high) == (None, None, None, None)


def test_json_round_trip(models: Models, make_suite: Callable[..., Suite]) -> None:
    describe = ModelInfo(name="a", bits_per_weight_linears=4.127, recipe={"rules": [{"match": "*"}]})
    evaluated = [EvaluatedModel(model, describe) for model in models]
    result = compare(evaluated[0], evaluated[1:], Bytes(), make_suite(protocol="strided", context=16))
    assert Comparison.from_json(result.to_json()) == result
    fields = json.loads(result.to_json())
    assert fields["schema_version"] == "neoquant.comparison/2"
    assert fields["candidates"][0]["evaluation"]["total"]["bits_per_byte"] > 0
    assert fields["resampling"]["unit"] == "window"
    alone = result.reference
    assert Evaluation.from_json(alone.to_json()) == alone
    assert alone.suite.stride == 8 and alone.data.tokenizer_sha256 == "bytes" and len(alone.data.sha256) == 64
    assert alone.environment.dtype == "float32" and alone.environment.device == "cpu"


@pytest.mark.parametrize("text", ["{}", "[]", "nonsense", '{"schema_version": "neoquant.evaluation/9"}'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="not a saved evaluation of this version"):
        Evaluation.from_json(text)


def test_progress_reaches_its_totals(models: Models, make_suite: Callable[..., Suite]) -> None:
    done: dict[str, tuple[float | None, float]] = {}

    class Listener(Progress):
        @contextmanager
        def task(self, label: str, total: float | None) -> Iterator[Callable[[float], None]]:
            reached = 0.0

            def advance(amount: float) -> None:
                nonlocal reached
                reached += amount

            yield advance
            done[label] = (total, reached)

    evaluate(models.reference, Bytes(), make_suite(), describe=ModelInfo(name="a"), progress=Listener())
    assert set(done) == {"reading texts.jsonl", "scoring"}
    assert all(reached == total for total, reached in done.values())


def test_refusals(models: Models, make_suite: Callable[..., Suite]) -> None:
    def attempt(suite: Suite, tokenizer: Any = None, model: Any = models.reference) -> None:
        evaluate(model, tokenizer or Bytes(), suite, describe=ModelInfo(name="a"))

    with pytest.raises(RequestError, match="context of 64 tokens, but the model has 32 positions"):
        attempt(make_suite(context=64))
    with pytest.raises(DataError, match="subset 'code' of suite mine leaves nothing to score"):
        attempt(make_suite([("code", ""), ("prose", "something")]))
    endless = Bytes()
    endless.eos_token_id = None
    with pytest.raises(RequestError, match="this tokenizer has none"):
        attempt(make_suite(), endless)
    foreign = Bytes()
    foreign.encode = lambda text, **_: [999]  # type: ignore[method-assign]
    with pytest.raises(RequestError, match="gives token 999, but the model knows 259 tokens"):
        attempt(make_suite(), foreign)
    damaged = copy.deepcopy(models.reference)
    with torch.no_grad():
        damaged.transformer.ln_f.weight[0] = float("nan")
    with pytest.raises(CheckpointError, match="a's loss on code, line 1, is not a finite number"):
        attempt(make_suite(), model=damaged)


def test_notes_say_what_was_dropped_or_differs(make_suite: Callable[..., Suite]) -> None:
    corpus = read_corpus(make_suite(protocol="joined", context=20, documents=2, sha256="0" * 64), Bytes(), SILENT)
    code = sum(len(text) for subset, text in TEXTS[:3] if subset == "code") + 2
    assert corpus.notes[0] == f"code: dropped for filling no window: the last {code % 20} tokens"
    assert corpus.notes[-1].startswith("the documents are not those of the published figures (sha256 ")
    short = read_corpus(make_suite(context=20, documents=50), Bytes(), SILENT)
    assert short.notes[-1] == "fewer than 50 documents: code 3, prose 3"


def test_bytes_of_joined_windows_add_up() -> None:
    """Windows cut characters; nothing is counted twice or lost, U+FFFD in the text included."""
    text = "a\ufffd漢字😀\ufffd" * 5 + "é"
    ids = Bytes().encode(text)
    offsets = byte_offsets(text, ids, range(len(ids) + 1), Bytes().decode)
    assert offsets[0] == 0 and offsets[-1] == len(text.encode())
    assert offsets == sorted(offsets)
    assert all(offset <= position < offset + 7 for position, offset in enumerate(offsets))


def test_batches_keep_every_window(make_suite: Callable[..., Suite]) -> None:
    corpus = read_corpus(make_suite(context=16), Bytes(), SILENT)
    made = list(batches(corpus.windows, 64))
    assert sorted(number for batch in made for number in batch) == list(range(len(corpus.windows)))
    lengths = [[len(corpus.windows[number].ids) for number in batch] for batch in made]
    assert all(len(batch) == 1 or len(batch) * max(batch) <= 64 for batch in lengths)


def test_memory_does_not_grow_with_tokens_candidates_or_vocabulary(
    make_model: Callable[..., Path], make_suite: Callable[..., Suite], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-Neo's vocabulary: of all logits of a window and all models, two pieces of a few rows are alive at once."""
    import weakref

    from neoquant.evaluation import scoring
    from neoquant.loading.pretrained import load

    monkeypatch.setattr(scoring, "CPU_LIMITS", scoring.BatchLimits(positions=64, rows=16))
    model, _ = load(make_model("wide", vocab_size=50257, hidden_size=6, num_heads=1), dtype="float32", device="cpu")
    alive: list[weakref.ref[torch.Tensor]] = []
    most = {"pieces": 0, "rows": 0}

    def watch(head: Any, arguments: Any, logits: torch.Tensor) -> None:
        alive.append(weakref.ref(logits))
        living = [found for ref in alive if (found := ref()) is not None]
        most["pieces"] = max(most["pieces"], len(living))
        most["rows"] = max(most["rows"], *(len(found) for found in living))

    model.lm_head.register_forward_hook(watch)
    suite = make_suite([("one", "some text " * 30), ("two", "other text " * 30)])
    accumulator = scoring.Accumulator(read_corpus(suite.fitted(32), Bytes(), SILENT), 5)
    entry = EvaluatedModel(model, ModelInfo(name="x"))
    result = compare(entry, [entry] * 4, Bytes(), suite)
    assert result.reference.total.tokens == 630 and len(alive) >= 5 * 630 / 16
    assert most["rows"] == 16 and most["pieces"] <= 3  # the reference's, a candidate's, and the one before it
    longer = make_suite([("one", "some text " * 300), ("two", "other text " * 300)])
    of_longer = scoring.Accumulator(read_corpus(longer.fitted(32), Bytes(), SILENT), 5)
    assert of_longer.counts.shape == accumulator.counts.shape
