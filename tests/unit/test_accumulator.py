"""What is kept of every token, against figures worked out by hand or from all tokens at once."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from byte_tokenizer import Bytes

from neoquant.data.suite import Suite
from neoquant.evaluation.accumulator import LARGEST, SEGMENT, Accumulator, TokenScores
from neoquant.evaluation.compare import _candidate
from neoquant.evaluation.corpus import Corpus, read_corpus
from neoquant.evaluation.perplexity import ScoredCorpus, summarize
from neoquant.evaluation.prediction_intervals import PredictionIntervals, prediction_intervals
from neoquant.evaluation.quantile_sketch import RELATIVE_ACCURACY
from neoquant.evaluation.result import Candidate, Environment, ModelInfo
from neoquant.progress import SILENT

ENVIRONMENT = Environment(neoquant="", torch="", python="", platform="", device="cpu", dtype="float32", threads=1)


def make_corpus(folder: Path, texts: list[tuple[str, str]], context: int = 100) -> Corpus:
    path = folder / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": t, "meta": {"pile_set_name": s}}) for s, t in texts))
    suite = Suite(name="mine", context=context, data={"kind": "file", "path": str(path)})
    return read_corpus(suite, Bytes(), SILENT)


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def log(*probabilities: float) -> torch.Tensor:
    return -f64(*probabilities).log()


def candidate(corpus: Corpus, accumulator: Accumulator) -> Candidate:
    scored = ScoredCorpus(corpus, Bytes(), accumulator, seconds=0)
    return _candidate(0, summarize(ModelInfo(name="b"), ENVIRONMENT, scored, 1), scored)


def test_a_case_by_hand(tmp_path: Path) -> None:
    """Five tokens in two subsets: every figure can be added up on paper."""
    corpus = make_corpus(tmp_path, [("A", "xyz"), ("B", "uv")])
    accumulator = Accumulator(corpus, 2)
    ones = torch.ones(5, dtype=torch.float64)
    tops = [torch.stack([f64(*top), f64(98, 99, 98, 99, 98)], dim=1) for top in ((1, 2, 3, 4, 5), (1, 2, 9, 4, 5))]
    shares = torch.stack([0.5 * ones, 0.25 * ones], dim=1)
    reference = TokenScores(log(0.5, 0.5, 0.5, 0.25, 0.125), 0 * ones, tops[0], shares, ones)
    other = TokenScores(log(0.25, 0.5, 0.5, 0.5, 0.125), f64(0.4, 0, 0.1, 0.2, 0.3), tops[1], shares, ones)
    accumulator.add([0, 1], [reference, other])
    found = candidate(corpus, accumulator)
    total, (a, b) = found.total, found.subsets
    ln2 = math.log(2)
    assert (a.nats_per_token, b.nats_per_token) == pytest.approx((ln2 / 3, -ln2 / 2))
    assert total.nats_per_token == pytest.approx(0) and total.perplexity_ratio == pytest.approx(1)
    assert (a.bits_per_byte, b.bits_per_byte, total.bits_per_byte) == pytest.approx((1 / 3, -1 / 2, 0))
    assert found.macro.nats_per_token == pytest.approx((ln2 / 3 - ln2 / 2) / 2)
    assert found.macro.bits_per_byte == pytest.approx((1 / 3 - 1 / 2) / 2)
    assert found.macro.kl == pytest.approx((0.5 / 3 + 0.5 / 2) / 2) and found.macro.agreement == pytest.approx(5 / 6)
    assert (total.agreement, a.agreement, b.agreement) == pytest.approx((4 / 5, 2 / 3, 1))
    assert (total.kl, a.kl, b.kl) == pytest.approx((0.2, 0.5 / 3, 0.25))
    divergence, change, probability = total.divergence, total.loss_change, total.probability_change
    assert divergence is not None and change is not None and probability is not None
    assert (divergence.minimum, divergence.maximum) == (0, 0.4)
    assert divergence.median == pytest.approx(0.2, rel=RELATIVE_ACCURACY)
    assert divergence.quantiles["90"] == pytest.approx(0.4, rel=RELATIVE_ACCURACY)
    assert (probability.minimum, probability.maximum) == pytest.approx((-0.25, 0.25))
    assert probability.rms == pytest.approx(math.sqrt(2 * 0.25**2 / 5)) and probability.mean == pytest.approx(0)
    assert (change.minimum, change.maximum, change.rms) == pytest.approx((-ln2, ln2, math.sqrt(2 * ln2**2 / 5)))
    assert divergence.histogram is not None and a.divergence is not None and a.divergence.histogram is None
    assert sum(divergence.histogram.counts) == 4 and divergence.histogram.below == 1
    assert [(unit.kl, unit.kl_maximum, unit.agreed) for unit in found.units] == [
        (pytest.approx(0.5), 0.4, 2),
        (pytest.approx(0.5), 0.3, 2),
    ]
    worst = found.worst_tokens
    assert [(token.token, token.kl) for token in worst] == [("x", 0.4), ("v", 0.3)]  # one in a stretch of text
    assert (worst[1].before, worst[1].after, worst[1].position) == ("u", "", 1)
    assert (worst[0].probability_reference, worst[0].probability) == pytest.approx((0.5, 0.25))
    assert [change.loss_change for change in worst[0].passage] == pytest.approx([ln2, 0, 0])
    assert [(top.text, top.probability) for top in worst[0].top_tokens] == [("\x00", 0.5), ("a", 0.25)]
    assert (worst[0].top, worst[0].top_reference) == (worst[0].top_tokens[0], worst[0].top_tokens_reference[0])
    intervals = {name: getattr(total, name) for name in PredictionIntervals.__annotations__}
    sums = torch.tensor([unit.kl for unit in found.units], dtype=torch.float64)
    agreed = torch.tensor([unit.agreed for unit in found.units], dtype=torch.float64)
    assert intervals == prediction_intervals(sums, agreed, f64(3, 2))
    assert 0 == intervals["kl_low"] < total.kl < intervals["kl_high"]
    assert 0 <= intervals["agreement_low"] < total.agreement < intervals["agreement_high"] == 1
    assert a.kl_low is None and a.agreement_high is None  # one document


def random_measures(corpus: Corpus, models: int) -> list[list[TokenScores]]:
    """For each window, what every model gives for its tokens."""
    random = torch.Generator().manual_seed(3)
    found = []
    for window in corpus.windows:
        values = torch.rand(models, 5, window.scored, generator=random, dtype=torch.float64)
        values[:, 1] **= 8
        values[:, 2] = (5 * values[:, 2]).floor()
        found.append([TokenScores(m[0], m[1], m[2][:, None], m[3][:, None], m[4]) for m in values])
    return found


def accumulated(corpus: Corpus, scores: list[list[TokenScores]], batches: list[list[int]]) -> Accumulator:
    accumulator = Accumulator(corpus, len(scores[0]))
    for batch in batches:
        models = zip(*(scores[window] for window in batch), strict=True)
        accumulator.add(batch, [TokenScores(*map(torch.cat, zip(*model, strict=True))) for model in models])
    return accumulator


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    texts = [(subset, subset * length) for length in (5, 61, 200, 333, 1000) for subset in "ABC"]
    return make_corpus(tmp_path_factory.mktemp("accumulator"), texts, context=70)


def test_all_tokens_at_once(corpus: Corpus) -> None:
    """Sums, quantiles and the worst tokens are those of the whole, in every subset."""
    scores = random_measures(corpus, 2)
    found = candidate(corpus, accumulated(corpus, scores, [[w] for w in range(len(corpus.windows))]))
    subsets = list(corpus.documents)
    for number, change in enumerate([found.total, *found.subsets]):
        windows = [
            w
            for w, window in enumerate(corpus.windows)
            if number == 0 or corpus.units[window.unit].subset == subsets[number - 1]
        ]
        reference, other = (
            TokenScores(*map(torch.cat, zip(*(scores[w][model] for w in windows), strict=True))) for model in (0, 1)
        )
        p = other.nats.neg().exp() - reference.nats.neg().exp()
        for distribution, values in (
            (change.divergence, other.kl),
            (change.loss_change, other.nats - reference.nats),
            (change.probability_change, p),
        ):
            assert distribution is not None
            assert distribution.mean == pytest.approx(float(values.mean()))
            assert distribution.rms == pytest.approx(float(values.square().mean().sqrt()))
            assert (distribution.minimum, distribution.maximum) == (float(values.min()), float(values.max()))
            for share, quantile in distribution.quantiles.items():
                exact = float(values.quantile(float(share) / 100, interpolation="higher"))
                near = float(values.quantile(float(share) / 100, interpolation="lower"))
                slack = RELATIVE_ACCURACY * max(abs(exact), abs(near)) + 1e-8
                assert near - slack <= quantile <= exact + slack
        assert change.agreement == pytest.approx(float((reference.top == other.top).double().mean()))


def test_neither_order_nor_place_matters(corpus: Corpus) -> None:
    """Batches in another order, cut otherwise, in two accumulators that are merged: bit for bit the same figures."""
    scores = random_measures(corpus, 3)
    windows = list(range(len(corpus.windows)))
    whole = accumulated(corpus, scores, [windows])
    shuffled = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0)).tolist()
    batches = [shuffled[start : start + 4] for start in range(0, len(shuffled), 4)]
    for other in (accumulated(corpus, scores, batches), merged(corpus, scores, batches)):
        for name in ("sums", "counts", "minima", "maxima"):
            assert torch.equal(getattr(whole, name), getattr(other, name)), name
        for model in range(2):
            assert whole.largest_divergences(model) == other.largest_divergences(model)
            assert len(whole.largest_divergences(model)) == LARGEST
            segments = [(token.unit, token.position // SEGMENT) for token in whole.largest_divergences(model)]
            assert len(set(segments)) == len(segments)


def merged(corpus: Corpus, scores: list[list[TokenScores]], batches: list[list[int]]) -> Accumulator:
    first, second = accumulated(corpus, scores, batches[::2]), accumulated(corpus, scores, batches[1::2])
    first.merge(second)
    return first
