"""What models lose against a reference, on identical windows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from neoquant.evaluation.corpus import Corpus, Tokenizer, read_corpus
from neoquant.evaluation.perplexity import summarize
from neoquant.evaluation.result import Candidate, Change, Comparison, ModelInfo, Resampling, UnitChange
from neoquant.evaluation.scoring import Model, Sums, score
from neoquant.evaluation.statistics import bootstrap_interval, ratio_error
from neoquant.evaluation.suite import Suite
from neoquant.progress import SILENT, Progress


class Contestant(NamedTuple):
    """A model, and what the result says about it."""

    model: Model
    describe: ModelInfo


def compare(
    reference: Contestant,
    others: Sequence[Contestant],
    tokenizer: Tokenizer,
    suite: Suite,
    *,
    progress: Progress = SILENT,
) -> Comparison:
    """Score `reference` once and every other model beside it, on the same windows of `suite`.

    Raises what `evaluate` raises, and RequestError for models of different vocabularies.
    """
    started = time.perf_counter()
    contestants = [reference, *others]
    positions = min(contestant.model.config.max_position_embeddings for contestant in contestants)
    corpus = read_corpus(suite.fitted(positions), tokenizer, progress)
    results = score([contestant.model for contestant in contestants], corpus, progress)
    seconds = time.perf_counter() - started
    evaluations = [
        summarize(contestant.model, contestant.describe, corpus, tokenizer, sums.nats, seconds)
        for contestant, sums in zip(contestants, results, strict=True)
    ]
    candidates = []
    for evaluation, sums in zip(evaluations[1:], results[1:], strict=True):
        total, *subsets = changes(corpus, results[0], sums)
        units = tuple(
            UnitChange(id=unit.id, subset=unit.subset, kl=kl, agreed=int(agreed))
            for unit, kl, agreed in zip(corpus.units, sums.kl.tolist(), sums.agreed.tolist(), strict=True)
        )
        candidates.append(Candidate(evaluation=evaluation, total=total, subsets=tuple(subsets), units=units))
    resampling = Resampling(unit="document" if corpus.suite.protocol == "rolling" else "window")
    return Comparison(reference=evaluations[0], candidates=tuple(candidates), resampling=resampling)


def changes(corpus: Corpus, reference: Sums, other: Sums) -> list[Change]:
    """From `reference` to `other`: in total, then in every subset."""
    everything = torch.ones(len(corpus.units), dtype=torch.bool)
    chosen = {"total": everything} | {
        subset: torch.tensor([unit.subset == subset for unit in corpus.units]) for subset in corpus.documents
    }
    tokens = torch.tensor([unit.tokens for unit in corpus.units], dtype=torch.float64)
    return [_change(subset, reference, other, tokens, units & (tokens > 0)) for subset, units in chosen.items()]


def _change(subset: str, reference: Sums, other: Sums, tokens: torch.Tensor, units: torch.Tensor) -> Change:
    tokens = tokens[units]
    difference = (other.nats - reference.nats)[units]
    interval = bootstrap_interval(difference, tokens)
    return Change(
        subset=subset,
        nats_per_token=float(difference.sum() / tokens.sum()),
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        agreement=float(other.agreed[units].sum() / tokens.sum()),
        agreement_error=ratio_error(other.agreed[units], tokens),
        kl=float(other.kl[units].sum() / tokens.sum()),
    )
