"""Perplexity and bits per byte of one model on a suite."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Collection, Iterator, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch

from neoquant.data.suite import Suite
from neoquant.distributed import SINGLE_PROCESS, ProcessGroup
from neoquant.evaluation.accumulator import Accumulator
from neoquant.evaluation.corpus import Corpus, TokenizerLike, read_corpus
from neoquant.evaluation.journal import Journal
from neoquant.evaluation.result import DataInfo, Environment, Evaluation, Macro, ModelInfo, Score, UnitScore
from neoquant.evaluation.scoring import Model, score
from neoquant.native import active
from neoquant.progress import SILENT, Progress
from neoquant.sizes import plural

JOURNAL_VERSION = 3
"""Of what a journal holds; a journal of another version is not read."""


class EvaluatedModel(NamedTuple):
    """A model, its description in the result, and the fingerprints of the documents that it was calibrated on."""

    model: Model
    describe: ModelInfo
    calibrated_on: frozenset[str] = frozenset()


class ScoredCorpus(NamedTuple):
    """A text, and all models' scores on it."""

    corpus: Corpus
    tokenizer: TokenizerLike
    accumulator: Accumulator
    seconds: float  # of reading and scoring


def evaluate(
    model: Model,
    tokenizer: TokenizerLike,
    suite: Suite,
    *,
    describe: ModelInfo,
    calibrated_on: Collection[str] = frozenset(),
    exclude_calibrated: bool = False,
    progress: Progress = SILENT,
    journal: Path | None = None,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> Evaluation:
    """Score `model` on `suite`; `describe` says in the result which model it was.

    `calibrated_on` are the fingerprints of the documents that the model was calibrated on (in its `calibration.json`):
    the result counts those that it was scored on, or `exclude_calibrated` leaves them out. `journal` names a file for
    the progress: the same call resumes from it after an interruption. It stays when this returns; `remove_journal`
    deletes it once the result is stored. `process_group` shares the work with other processes.

    Raises RequestError (context longer than the model's, another model's tokenizer), DataError, HubError,
    CheckpointError (a loss that is not finite), OutputError (the journal).
    """
    started = time.perf_counter()
    fitted = suite.fitted(model.config.max_position_embeddings)
    corpus = read_corpus(fitted, tokenizer, progress, calibrated_on if exclude_calibrated else ())
    evaluated = [EvaluatedModel(model, describe)]
    accumulator = score_with_journal(evaluated, corpus, tokenizer, progress, journal, process_group)
    scored = ScoredCorpus(corpus, tokenizer, accumulator, time.perf_counter() - started)
    return summarize(describe, environment(model), scored, 0, calibrated_on)


def score_with_journal(
    evaluated: Sequence[EvaluatedModel],
    corpus: Corpus,
    tokenizer: TokenizerLike,
    progress: Progress,
    path: Path | None,
    process_group: ProcessGroup,
) -> Accumulator:
    """`score`, with a journal at `path`, if one is given, that holds for these models on this text only."""
    key = _key(evaluated, corpus, tokenizer)
    process_group.require_equal(key)
    journal = Journal(path, key, process_group) if path else None
    models, names = [model for model, *_ in evaluated], [entry.describe.name for entry in evaluated]
    return score(models, corpus, progress, names=names, journal=journal, process_group=process_group)


def _key(evaluated: Sequence[EvaluatedModel], corpus: Corpus, tokenizer: TokenizerLike) -> str:
    """A hash of all that the figures depend on."""
    ours = environment(evaluated[0].model)
    parts = [
        JOURNAL_VERSION,
        *(
            (describe.sha256, describe.name, describe.activations, str(model.dtype), model.device.type)
            for model, describe, _ in evaluated
        ),
        (corpus.sha256, tokenizer.sha256, corpus.suite.protocol, corpus.suite.context, corpus.suite.stride),
        (ours.neoquant, ours.torch, ours.platform, ours.native),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def summarize(
    describe: ModelInfo,
    environment: Environment,
    scored: ScoredCorpus,
    number: int,
    calibrated_on: Collection[str] = frozenset(),
) -> Evaluation:
    """The result of model `number` of those that were scored."""
    corpus = scored.corpus
    units = _unit_scores(corpus, scored.accumulator, number)
    subsets = [
        _score(name, count, [unit for unit in units if unit.subset == name]) for name, count in corpus.documents.items()
    ]
    contaminated = contaminated_documents(corpus, calibrated_on)
    return Evaluation(
        model=describe,
        suite=corpus.suite,
        data=data_info(corpus, scored.tokenizer),
        environment=environment,
        total=_score("total", sum(corpus.documents.values()), units),
        macro=Macro(
            nats_per_token=fmean(score.nats_per_token for score in subsets),
            bits_per_byte=fmean(score.bits_per_byte for score in subsets),
        ),
        subsets=tuple(subsets),
        units=units,
        calibrated_on=contaminated,
        notes=(*corpus.notes, *contamination_notes(describe.name, contaminated, corpus)),
        seconds=scored.seconds,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _unit_scores(corpus: Corpus, accumulator: Accumulator, number: int) -> tuple[UnitScore, ...]:
    nats, hits = accumulator.by_unit(number, "nats").tolist(), accumulator.by_unit(number, "hits").tolist()
    is_last_word = corpus.suite.protocol == "last-word"
    return tuple(
        UnitScore(
            id=unit.id,
            subset=unit.subset,
            tokens=unit.tokens,
            bytes=unit.bytes,
            nats=loss,
            words=unit.words,
            correct=hit == unit.tokens if is_last_word else None,
        )
        for unit, loss, hit in zip(corpus.units, nats, hits, strict=True)
    )


def data_info(corpus: Corpus, tokenizer: TokenizerLike) -> DataInfo:
    """A result's description of the text that it was measured on."""
    return DataInfo(
        source=corpus.source.name,
        revision=corpus.source.revision,
        sha256=corpus.sha256,
        tokenizer_sha256=tokenizer.sha256,
        excluded=corpus.excluded,
    )


def contaminated_documents(corpus: Corpus, calibrated_on: Collection[str]) -> int:
    """The number of documents of the text that have one of these fingerprints."""
    known = frozenset(calibrated_on)
    return sum(document in known for document in corpus.fingerprints)


def contamination_notes(name: str, contaminated: int, corpus: Corpus) -> Iterator[str]:
    """The note that model `name` was calibrated on so many of the documents, if it was on any."""
    if contaminated:
        yield (
            f"{name} was calibrated on {contaminated} of the {plural(len(corpus.fingerprints), 'document')}: "
            "its figures flatter it; leave them out with --exclude-calibrated"
        )


def _score(subset: str, documents: int, units: Sequence[UnitScore]) -> Score:
    words = [unit.words for unit in units if unit.words is not None]
    correct = [unit.correct for unit in units if unit.correct is not None]
    return Score(
        subset=subset,
        documents=documents,
        tokens=sum(unit.tokens for unit in units),
        bytes=sum(unit.bytes for unit in units),
        nats=sum(unit.nats for unit in units),
        words=sum(words) if words else None,
        correct=sum(correct) if correct else None,
    )


def environment(model: Model) -> Environment:
    """Versions, device and type that `model` computes with."""
    device = model.device
    return Environment(
        neoquant=_version("neoquant") or "not installed",
        torch=torch.__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        processor=_processor(),
        native=active().reason,
        tokenizers=_version("tokenizers"),
    )


def _processor() -> str | None:
    """The CPU's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
