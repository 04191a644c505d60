"""Compares models with a reference on identical windows."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch

from neoquant.data.suite import Suite
from neoquant.distributed import SINGLE_PROCESS, ProcessGroup
from neoquant.evaluation.accumulator import DISTRIBUTIONS, SUMS, Accumulator
from neoquant.evaluation.corpus import Corpus, TokenizerLike, read_corpus
from neoquant.evaluation.largest_divergences import worst_documents, worst_tokens
from neoquant.evaluation.perplexity import EvaluatedModel, ScoredCorpus, environment, score_with_journal, summarize
from neoquant.evaluation.prediction_intervals import prediction_intervals
from neoquant.evaluation.quantile_sketch import histogram_counts, quantiles
from neoquant.evaluation.result import (
    LN2,
    QUANTILES,
    Candidate,
    Change,
    Comparison,
    Distribution,
    Evaluation,
    Histogram,
    MacroChange,
    Resampling,
    UnitChange,
)
from neoquant.evaluation.statistics import mean_interval, ratio_error, ratio_interval
from neoquant.progress import SILENT, Progress


def compare(
    reference: EvaluatedModel,
    others: Sequence[EvaluatedModel],
    tokenizer: TokenizerLike,
    suite: Suite,
    *,
    exclude_calibrated: bool = False,
    progress: Progress = SILENT,
    journal: Path | None = None,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> Comparison:
    """Score `reference` once and every other model beside it, on the same windows of `suite`.

    `exclude_calibrated` leaves out, for all models alike, documents that any of them was calibrated on. `journal` and
    `process_group` are those of `evaluate`. Raises what `evaluate` raises, and RequestError for models of different
    vocabularies.
    """
    started = time.perf_counter()
    evaluated = [reference, *others]
    positions = min(entry.model.config.max_position_embeddings for entry in evaluated)
    known = frozenset[str]().union(*(entry.calibrated_on for entry in evaluated))
    corpus = read_corpus(suite.fitted(positions), tokenizer, progress, known if exclude_calibrated else ())
    accumulator = score_with_journal(evaluated, corpus, tokenizer, progress, journal, process_group)
    scored = ScoredCorpus(corpus, tokenizer, accumulator, time.perf_counter() - started)
    base, *evaluations = [
        summarize(entry.describe, environment(entry.model), scored, number, entry.calibrated_on)
        for number, entry in enumerate(evaluated)
    ]
    candidates = [_candidate(number, evaluation, scored) for number, evaluation in enumerate(evaluations)]
    resampling = Resampling(unit="document" if corpus.suite.protocol in ("rolling", "last-word") else "window")
    return Comparison(reference=base, candidates=tuple(candidates), resampling=resampling)


def _candidate(number: int, evaluation: Evaluation, scored: ScoredCorpus) -> Candidate:
    corpus, tokenizer, accumulator, _ = scored
    sums = {name: accumulator.by_unit(number + 1, name) for name in SUMS}
    sums["loss"] = sums["nats"] - accumulator.by_unit(0, "nats")
    total, *subsets = _changes(number, corpus, accumulator, sums)
    tokens, size = _sizes(corpus)
    chosen = [accumulator.subsets == subset for subset in range(len(subsets))]
    units = tuple(
        UnitChange(
            id=unit.id,
            subset=unit.subset,
            kl=float(sums["kl"][row]),
            kl_maximum=float(sums["kl_maximum"][row]),
            agreed=int(sums["agreed"][row]),
            probability_squares=float(sums["probability_squares"][row]),
        )
        for row, unit in enumerate(corpus.units)
    )
    return Candidate(
        evaluation=evaluation,
        total=total,
        macro=macro_change(subsets, [(sums["loss"][units], tokens[units], size[units]) for units in chosen]),
        subsets=tuple(subsets),
        units=units,
        worst_documents=worst_documents(corpus, tokenizer, sums["loss"], sums["kl"]),
        worst_tokens=worst_tokens(corpus, tokenizer, accumulator.largest_divergences(number)),
    )


def _sizes(corpus: Corpus) -> tuple[torch.Tensor, torch.Tensor]:
    """The scored tokens and the bytes of each unit: float64[units]."""
    tokens = torch.tensor([unit.tokens for unit in corpus.units], dtype=torch.float64)
    return tokens, torch.tensor([unit.bytes for unit in corpus.units], dtype=torch.float64)


def _changes(number: int, corpus: Corpus, accumulator: Accumulator, sums: dict[str, torch.Tensor]) -> list[Change]:
    """A candidate's change from the reference: in total, then in every subset."""
    tokens, size = _sizes(corpus)
    found = []
    for subset, chosen in [(None, tokens > 0), *((s, accumulator.subsets == s) for s in range(len(corpus.documents)))]:
        units = chosen & (tokens > 0)
        t, b = tokens[units], size[units]
        part = {name: values[units] for name, values in sums.items()}
        distributions = {
            name: _distribution(accumulator, number, name, subset, part, float(t.sum())) for name in DISTRIBUTIONS
        }
        name = "total" if subset is None else list(corpus.documents)[subset]
        predictions = {
            **_accuracy(number, corpus, accumulator, units),
            "agreement": float(part["agreed"].sum() / t.sum()),
            "agreement_error": ratio_error(part["agreed"], t),
            "kl": float(part["kl"].sum() / t.sum()),
            "kl_error": ratio_error(part["kl"], t),
            **prediction_intervals(part["kl"], part["agreed"], t),
            **distributions,
        }
        found.append(unit_changes(name, part["loss"], t, b).model_copy(update=predictions))
    return found


def _accuracy(number: int, corpus: Corpus, accumulator: Accumulator, units: torch.Tensor) -> dict[str, float | None]:
    """The change of the accuracy of last words, for a protocol that scores them."""
    if corpus.suite.protocol != "last-word":
        return {}
    tokens, _ = _sizes(corpus)
    right = [(accumulator.by_unit(model, "hits") == tokens).double()[units] for model in (0, number + 1)]
    difference = right[1] - right[0]
    interval = ratio_interval(difference, torch.ones_like(difference))
    return {
        "accuracy": float(difference.mean()),
        "accuracy_low": interval.low if interval else None,
        "accuracy_high": interval.high if interval else None,
    }


def unit_changes(subset: str, loss: torch.Tensor, tokens: torch.Tensor, size: torch.Tensor) -> Change:
    """The change by units' losses alone: float64[units] each, nats above the reference's, tokens, bytes."""
    scored = tokens > 0
    loss, tokens, size = loss[scored], tokens[scored], size[scored]
    interval, by_bytes = ratio_interval(loss, tokens), ratio_interval(loss / LN2, size)
    return Change(
        subset=subset,
        nats_per_token=float(loss.sum() / tokens.sum()),
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        bits_per_byte=float(loss.sum() / LN2 / size.sum()),
        bits_per_byte_low=by_bytes.low if by_bytes else None,
        bits_per_byte_high=by_bytes.high if by_bytes else None,
    )


def macro_change(
    subsets: Sequence[Change], parts: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
) -> MacroChange:
    """The means of the subsets' changes, whose units' (loss, tokens, bytes) are `parts`."""
    scored = [(loss[t > 0], t[t > 0], size[t > 0]) for loss, t, size in parts]
    interval = mean_interval([(loss, tokens) for loss, tokens, _ in scored])
    by_bytes = mean_interval([(loss / LN2, size) for loss, _, size in scored])
    divergences = [change.kl for change in subsets if change.kl is not None]
    agreements = [change.agreement for change in subsets if change.agreement is not None]
    return MacroChange(
        nats_per_token=fmean(change.nats_per_token for change in subsets),
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        bits_per_byte=fmean(change.bits_per_byte for change in subsets),
        bits_per_byte_low=by_bytes.low if by_bytes else None,
        bits_per_byte_high=by_bytes.high if by_bytes else None,
        kl=fmean(divergences) if divergences else None,
        agreement=fmean(agreements) if agreements else None,
    )


def _distribution(
    accumulator: Accumulator, number: int, name: str, subset: int | None, sums: dict[str, torch.Tensor], tokens: float
) -> Distribution:
    """The distribution of KL, or of the change of loss or probability, over the tokens of one subset, or of all."""
    index = DISTRIBUTIONS.index(name)
    chosen = slice(None) if subset is None else slice(subset, subset + 1)
    counts = accumulator.counts[number, index, chosen].sum(0)
    minimum = float(accumulator.minima[number, index, chosen].amin())
    maximum = float(accumulator.maxima[number, index, chosen].amax())
    mean, squares = (("kl", "kl_squares"), ("loss", "loss_squares"), ("probability", "probability_squares"))[index]
    values = quantiles(counts, [float(share) / 100 for share in QUANTILES])
    values = [min(max(value, minimum), maximum) for value in values]
    return Distribution(
        mean=float(sums[mean].sum()) / tokens,
        rms=math.sqrt(float(sums[squares].sum()) / tokens),
        minimum=minimum,
        maximum=maximum,
        quantiles=dict(zip(QUANTILES, values, strict=True)),
        histogram=_histogram(counts, name, values) if subset is None else None,
    )


def _histogram(counts: torch.Tensor, name: str, values: list[float]) -> Histogram:
    """KL in ten bins a decade, a change in equal bins that reach from the 0.1 % to the 99.9 % quantile."""
    if name == "divergence":
        edges = [10 ** (tenth / 10) for tenth in range(-70, 21)]
    else:
        reach = max(abs(values[0]), abs(values[-1]), 1e-6)
        edges = [reach * step / 40 for step in range(-40, 41)]
    inside, below, above = histogram_counts(counts, edges)
    return Histogram(edges=tuple(edges), counts=tuple(inside), below=below, above=above)
