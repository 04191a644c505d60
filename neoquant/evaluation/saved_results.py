"""Comparing results that were saved: the same statistics from what documents scored, without the models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from neoquant.errors import DataError, RequestError, locate
from neoquant.evaluation.compare import macro_change, unit_changes
from neoquant.evaluation.result import Candidate, Comparison, Evaluation, Resampling
from neoquant.evaluation.task_result import TaskEvaluation
from neoquant.files.reading import MAX_LARGE_BYTES, parse_json, read_text


def read_result(path: str | Path) -> Evaluation | Comparison:
    """What `--json` wrote. Raises DataError for a file that is not one of ours, or of another schema version."""
    text, version = _read(path)
    with locate(str(path)):
        return Comparison.from_json(text) if version.startswith("neoquant.comparison") else Evaluation.from_json(text)


def is_task_result(path: str | Path) -> bool:
    """Whether `--json` wrote it of tasks. Raises DataError for a file that is no JSON."""
    return _read(path)[1].startswith("neoquant.task-")


def read_task_result(path: str | Path) -> TaskEvaluation:
    """What `eval --task` wrote. Raises DataError for a file that is none, RequestError for another result of ours."""
    text, version = _read(path)
    with locate(str(path)):
        if version.startswith("neoquant.") and not version.startswith("neoquant.task-evaluation"):
            raise RequestError(f"it is a {version}: name what neoquant eval --task wrote")
        return TaskEvaluation.from_json(text)


def _read(path: str | Path) -> tuple[str, str]:
    """A file's text and the schema version that it states, or nothing."""
    text = read_text(path, limit=MAX_LARGE_BYTES, error=DataError)
    with locate(str(path)):
        try:
            fields = parse_json(text)
        except ValueError as error:
            raise DataError(f"cannot be read as a result: {error}") from None
    return text, str(fields.get("schema_version", "")) if isinstance(fields, dict) else ""


def compare_saved(results: Sequence[Evaluation | Comparison], names: Sequence[str]) -> Comparison:
    """All models of `results` against the first one's model (its reference, if it is a comparison).

    Evaluations are compared document by document, which gives changes and intervals, but neither agreement nor
    divergence; a comparison's candidates are taken as they are. `names` are the files, for errors.

    Raises RequestError, naming the difference, where results are of different text, tokenizers or protocols, or where a
    comparison is against another model.
    """
    first = results[0]
    base = first.reference if isinstance(first, Comparison) else first
    candidates = list(first.candidates) if isinstance(first, Comparison) else []
    for result, name in zip(results[1:], names[1:], strict=True):
        with locate(name):
            evaluation = result.reference if isinstance(result, Comparison) else result
            require_same_text(base, evaluation, names[0])
            if isinstance(result, Evaluation):
                candidates.append(_candidate(base, result))
            elif _identity(evaluation) != _identity(base):
                raise RequestError(
                    f"it compares with {evaluation.model.name} (weights {str(evaluation.model.sha256)[:12]}), and "
                    f"{names[0]} is of {base.model.name} (weights {str(base.model.sha256)[:12]})"
                )
            else:
                candidates += result.candidates
    if not candidates:
        raise RequestError(f"{names[0]} holds one model: name a second result to compare it with")
    unit = "document" if base.suite.protocol in ("rolling", "last-word") else "window"
    return Comparison(
        reference=base, candidates=tuple(candidates), resampling=Resampling.model_validate({"unit": unit})
    )


def require_same_text(base: Evaluation, other: Evaluation, name: str) -> None:
    """Raise RequestError, with what differs, unless both scored the same tokens in the same windows."""
    pairs = {
        "protocol": (base.suite.protocol, other.suite.protocol),
        "context": (base.suite.context, other.suite.context),
        "stride": (base.suite.stride, other.suite.stride),
        "tokenizer (sha256)": (base.data.tokenizer_sha256, other.data.tokenizer_sha256),
        "text (sha256)": (base.data.sha256, other.data.sha256),
    }
    differences = [
        f"{what} {str(theirs)[:12]}, not {str(ours)[:12]}" for what, (ours, theirs) in pairs.items() if ours != theirs
    ]
    if differences:
        raise RequestError(f"not measured as {name} was: {'; '.join(differences)}")
    if not base.units or not all(any(unit.subset == score.subset for unit in base.units) for score in base.subsets):
        raise DataError(f"{name} does not hold what each document scored")
    if any(unit.tokens < 1 or unit.bytes < 1 for unit in base.units if unit.tokens or unit.bytes):
        raise DataError(f"{name} holds documents with fewer than no tokens or bytes")
    ours, theirs = (
        [(unit.id, unit.subset, unit.tokens, unit.bytes) for unit in result.units] for result in (base, other)
    )
    if ours != theirs or [score.subset for score in base.subsets] != [score.subset for score in other.subsets]:
        raise DataError(f"its documents are not those of {name}, though it states the same text")


def differing_environments(results: Sequence[Evaluation]) -> list[str]:
    """A note for each circumstance in which results differ; figures may then differ for other reasons than models."""
    notes = []
    for field in ("dtype", "device", "neoquant", "torch", "native"):
        found = dict.fromkeys(str(getattr(result.environment, field)) for result in results)
        if len(found) > 1:
            notes.append(f"results were computed with different {field}: {', '.join(found)}")
    return notes


def _identity(evaluation: Evaluation) -> tuple[str | None, tuple[float, ...]]:
    return evaluation.model.sha256, tuple(unit.nats for unit in evaluation.units)


def _candidate(base: Evaluation, other: Evaluation) -> Candidate:
    def column(evaluation: Evaluation, name: str) -> torch.Tensor:
        return torch.tensor([getattr(unit, name) for unit in evaluation.units], dtype=torch.float64)

    loss = column(other, "nats") - column(base, "nats")
    tokens, size = column(base, "tokens"), column(base, "bytes")
    subsets = [score.subset for score in base.subsets]
    chosen = {
        subset: torch.tensor([unit.subset == subset for unit in base.units], dtype=torch.bool) for subset in subsets
    }
    total, *changes = (
        unit_changes(name, loss[units], tokens[units], size[units])
        for name, units in {"total": torch.ones(len(tokens), dtype=torch.bool), **chosen}.items()
    )
    macro = macro_change(changes, [(loss[units], tokens[units], size[units]) for units in chosen.values()])
    return Candidate(evaluation=other, total=total, macro=macro, subsets=tuple(changes))
