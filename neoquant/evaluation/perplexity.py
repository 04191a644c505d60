"""Perplexity and bits per byte of one model on a suite."""

from __future__ import annotations

import platform
import time
from collections.abc import Collection, Iterator, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean

import torch

from neoquant.evaluation.corpus import Corpus, Tokenizer, read_corpus
from neoquant.evaluation.result import DataInfo, Environment, Evaluation, Macro, ModelInfo, Score, UnitScore
from neoquant.evaluation.scoring import Model, score
from neoquant.evaluation.suite import Suite
from neoquant.native import active
from neoquant.progress import SILENT, Progress


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    suite: Suite,
    *,
    describe: ModelInfo,
    calibrated_on: Collection[str] = frozenset(),
    exclude_calibrated: bool = False,
    progress: Progress = SILENT,
) -> Evaluation:
    """Score `model` on `suite`; `describe` says in the result which model it was.

    `calibrated_on` are the fingerprints of documents that the model was rounded with (in its `calibration.json`): the
    result says how many of them it was scored on, or they are left out where `exclude_calibrated` asks for it.

    Raises RequestError (context longer than the model's, another model's tokenizer), DataError, HubError,
    CheckpointError (a loss that is not finite).
    """
    started = time.perf_counter()
    fitted = suite.fitted(model.config.max_position_embeddings)
    corpus = read_corpus(fitted, tokenizer, progress, calibrated_on if exclude_calibrated else ())
    tally = score([model], corpus, progress, names=[describe.name])
    seconds = time.perf_counter() - started
    return summarize(describe, environment(model), corpus, tokenizer, tally.by_unit(0, "nats"), seconds, calibrated_on)


def summarize(
    describe: ModelInfo,
    environment: Environment,
    corpus: Corpus,
    tokenizer: Tokenizer,
    nats: torch.Tensor,
    seconds: float,
    calibrated_on: Collection[str] = frozenset(),
) -> Evaluation:
    """An Evaluation from nats[units]."""
    known = frozenset(calibrated_on)
    met = sum(document in known for document in corpus.fingerprints)
    units = [
        UnitScore(id=u.id, subset=u.subset, tokens=u.tokens, bytes=u.bytes, nats=n)
        for u, n in zip(corpus.units, nats.tolist(), strict=True)
    ]
    subsets = [
        _score(name, count, [unit for unit in units if unit.subset == name]) for name, count in corpus.documents.items()
    ]
    return Evaluation(
        model=describe,
        suite=corpus.suite,
        data=DataInfo(
            source=corpus.source.name,
            revision=corpus.source.revision,
            sha256=corpus.sha256,
            tokenizer_sha256=tokenizer.sha256,
            excluded=corpus.excluded,
        ),
        environment=environment,
        total=_score("total", sum(corpus.documents.values()), units),
        macro=Macro(
            nats_per_token=fmean(score.nats_per_token for score in subsets),
            bits_per_byte=fmean(score.bits_per_byte for score in subsets),
        ),
        subsets=tuple(subsets),
        units=tuple(units),
        calibrated_on=met,
        notes=(*corpus.notes, *_flattered(describe.name, met, len(corpus.fingerprints))),
        seconds=seconds,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _flattered(name: str, met: int, documents: int) -> Iterator[str]:
    if met:
        yield (
            f"{met} of the {documents} documents were calibrated on by {name}: its figures flatter it; leave them out "
            "with --exclude-calibrated"
        )


def _score(subset: str, documents: int, units: Sequence[UnitScore]) -> Score:
    return Score(
        subset=subset,
        documents=documents,
        tokens=sum(unit.tokens for unit in units),
        bytes=sum(unit.bytes for unit in units),
        nats=sum(unit.nats for unit in units),
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
