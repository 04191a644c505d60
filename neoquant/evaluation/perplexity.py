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
from neoquant.evaluation.accumulator import Tally
from neoquant.evaluation.corpus import Corpus, Tokenizer, read_corpus
from neoquant.evaluation.distributed import ALONE, Team
from neoquant.evaluation.journal import Journal
from neoquant.evaluation.result import DataInfo, Environment, Evaluation, Macro, ModelInfo, Score, UnitScore
from neoquant.evaluation.scoring import Model, score
from neoquant.native import active
from neoquant.progress import SILENT, Progress

JOURNAL_LAYOUT = 2
"""Raised when what a journal holds changes: it is no use to another layout's reader."""


class Contestant(NamedTuple):
    """A model, what the result says about it, and the fingerprints of the documents that it was calibrated on."""

    model: Model
    describe: ModelInfo
    calibrated_on: frozenset[str] = frozenset()


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    suite: Suite,
    *,
    describe: ModelInfo,
    calibrated_on: Collection[str] = frozenset(),
    exclude_calibrated: bool = False,
    progress: Progress = SILENT,
    journal: Path | None = None,
    team: Team = ALONE,
) -> Evaluation:
    """Score `model` on `suite`; `describe` says in the result which model it was.

    `calibrated_on` are the fingerprints of documents that the model was rounded with (in its `calibration.json`): the
    result says how many of them it was scored on, or they are left out where `exclude_calibrated` asks for it.
    `journal` names a file for what has been scored so far: the same call resumes from it after an interruption. It
    stays when this returns; `remove_journal` deletes it once the result is stored safely. `team` shares the work with
    other processes.

    Raises RequestError (context longer than the model's, another model's tokenizer), DataError, HubError,
    CheckpointError (a loss that is not finite), OutputError (the journal).
    """
    started = time.perf_counter()
    fitted = suite.fitted(model.config.max_position_embeddings)
    corpus = read_corpus(fitted, tokenizer, progress, calibrated_on if exclude_calibrated else ())
    tally = score_kept([Contestant(model, describe)], corpus, tokenizer, progress, journal, team)
    seconds = time.perf_counter() - started
    return summarize(describe, environment(model), corpus, tokenizer, tally, 0, seconds, calibrated_on)


def score_kept(
    contestants: Sequence[Contestant],
    corpus: Corpus,
    tokenizer: Tokenizer,
    progress: Progress,
    path: Path | None,
    team: Team,
) -> Tally:
    """`score`, with a journal of exactly these models on exactly this text, where a path for it is given."""
    key = _key(contestants, corpus, tokenizer)
    team.agree(key)
    journal = Journal(path, key, team) if path else None
    models, names = [model for model, *_ in contestants], [contestant.describe.name for contestant in contestants]
    return score(models, corpus, progress, names=names, journal=journal, team=team)


def _key(contestants: Sequence[Contestant], corpus: Corpus, tokenizer: Tokenizer) -> str:
    """One hash of all that the figures depend on."""
    ours = environment(contestants[0].model)
    parts = [
        JOURNAL_LAYOUT,
        *(
            (describe.sha256, describe.name, describe.activations, str(model.dtype), model.device.type)
            for model, describe, _ in contestants
        ),
        (corpus.sha256, tokenizer.sha256, corpus.suite.protocol, corpus.suite.context, corpus.suite.stride),
        (ours.neoquant, ours.torch, ours.platform, ours.native),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def summarize(
    describe: ModelInfo,
    environment: Environment,
    corpus: Corpus,
    tokenizer: Tokenizer,
    tally: Tally,
    number: int,
    seconds: float,
    calibrated_on: Collection[str] = frozenset(),
) -> Evaluation:
    """What model `number` of a tally scored."""
    met = documents_met(corpus, calibrated_on)
    last_words = corpus.suite.protocol == "last-word"
    nats, hits = tally.by_unit(number, "nats").tolist(), tally.by_unit(number, "hits").tolist()
    units = [
        UnitScore(
            id=u.id,
            subset=u.subset,
            tokens=u.tokens,
            bytes=u.bytes,
            nats=n,
            words=u.words,
            correct=hit == u.tokens if last_words else None,
        )
        for u, n, hit in zip(corpus.units, nats, hits, strict=True)
    ]
    subsets = [
        _score(name, count, [unit for unit in units if unit.subset == name]) for name, count in corpus.documents.items()
    ]
    return Evaluation(
        model=describe,
        suite=corpus.suite,
        data=data_info(corpus, tokenizer),
        environment=environment,
        total=_score("total", sum(corpus.documents.values()), units),
        macro=Macro(
            nats_per_token=fmean(score.nats_per_token for score in subsets),
            bits_per_byte=fmean(score.bits_per_byte for score in subsets),
        ),
        subsets=tuple(subsets),
        units=tuple(units),
        calibrated_on=met,
        notes=(*corpus.notes, *flattered(describe.name, met, corpus)),
        seconds=seconds,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def data_info(corpus: Corpus, tokenizer: Tokenizer) -> DataInfo:
    """What a result says of the text that it was measured on."""
    return DataInfo(
        source=corpus.source.name,
        revision=corpus.source.revision,
        sha256=corpus.sha256,
        tokenizer_sha256=tokenizer.sha256,
        excluded=corpus.excluded,
    )


def documents_met(corpus: Corpus, calibrated_on: Collection[str]) -> int:
    """How many documents of the text have one of these fingerprints."""
    known = frozenset(calibrated_on)
    return sum(document in known for document in corpus.fingerprints)


def flattered(name: str, met: int, corpus: Corpus) -> Iterator[str]:
    """The note that model `name` was calibrated on `met` of the documents, if it was on any."""
    if met:
        yield (
            f"{met} of the {len(corpus.fingerprints)} documents were calibrated on by {name}: its figures flatter it; "
            "leave them out with --exclude-calibrated"
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
