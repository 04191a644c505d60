"""Perplexity and bits per byte of one model on a suite."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from datetime import datetime, timezone

import torch

from neoquant.evaluation.corpus import Corpus, Tokenizer, read_corpus
from neoquant.evaluation.result import DataInfo, Environment, Evaluation, ModelInfo, Score, UnitScore
from neoquant.evaluation.scoring import Model, score
from neoquant.evaluation.suite import Suite
from neoquant.progress import SILENT, Progress


def evaluate(
    model: Model, tokenizer: Tokenizer, suite: Suite, *, describe: ModelInfo, progress: Progress = SILENT
) -> Evaluation:
    """Score `model` on `suite`; `describe` says in the result which model it was.

    Raises RequestError (context longer than the model's, another model's tokenizer), DataError, HubError,
    CheckpointError (a loss that is not finite).
    """
    started = time.perf_counter()
    corpus = read_corpus(suite.fitted(model.config.max_position_embeddings), tokenizer, progress)
    (sums,) = score([model], corpus, progress)
    return summarize(model, describe, corpus, tokenizer, sums.nats, time.perf_counter() - started)


def summarize(
    model: Model, describe: ModelInfo, corpus: Corpus, tokenizer: Tokenizer, nats: torch.Tensor, seconds: float
) -> Evaluation:
    """An Evaluation from nats[units]."""
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
        ),
        environment=environment(model),
        total=_score("total", sum(corpus.documents.values()), units),
        subsets=tuple(subsets),
        units=tuple(units),
        notes=corpus.notes,
        seconds=seconds,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
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
        neoquant=_version(),
        torch=torch.__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("neoquant")
    except PackageNotFoundError:
        return "not installed"
