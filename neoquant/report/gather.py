"""Saved results brought together for one report: only what was measured alike may stand side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from neoquant.errors import DataError, RequestError
from neoquant.evaluation.inspection_result import Inspection
from neoquant.evaluation.result import Comparison, Evaluation


class Gathered(NamedTuple):
    """Every candidate against one reference, and the inspections of some of them."""

    comparison: Comparison
    inspections: tuple[Inspection, ...]


def gather(files: Sequence[Path]) -> Gathered:
    """Read comparisons and inspections, and make one comparison of all candidates.

    Raises:
        DataError: a file is not one of these, in this version's schema.
        RequestError: there is no comparison, a candidate comes twice, or base, data or protocol differ.
    """
    comparisons: dict[Path, Comparison] = {}
    inspections: dict[Path, Inspection] = {}
    for path in files:
        found = _read(path)
        if isinstance(found, Comparison):
            comparisons[path] = found
        else:
            inspections[path] = found
    if not comparisons:
        raise RequestError(f"{_listed(inspections)} holds no comparison: make one with neoquant compare ... --json")
    merged = _merge(comparisons)
    for path, inspection in inspections.items():
        first = next(iter(comparisons))
        _check_same(path, _weights(inspection.base.sha256), first, _weights(merged.reference.model.sha256))
    return Gathered(merged, tuple(inspections.values()))


def _read(path: Path) -> Comparison | Inspection:
    try:
        text = path.read_text(encoding="utf-8")
        schema = str(dict(json.loads(text)).get("schema_version"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError):
        raise DataError(f"{path} is not a result of neoquant: no JSON object") from None
    kind = schema.partition("/")[0]
    try:
        if kind == "neoquant.comparison":
            return Comparison.from_json(text)
        if kind == "neoquant.inspection":
            return Inspection.from_json(text)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    if kind == "neoquant.evaluation":
        raise DataError(f"{path} is the evaluation of one model: a report needs comparisons, from neoquant compare")
    raise DataError(f"{path} is not a result of neoquant: its schema_version is {schema!r}")


def _merge(comparisons: Mapping[Path, Comparison]) -> Comparison:
    (first_path, first), *others = comparisons.items()
    known = {candidate.evaluation.model.name: first_path for candidate in first.candidates}
    candidates = list(first.candidates)
    for path, other in others:
        _check_same(path, _protocol(other.reference), first_path, _protocol(first.reference))
        for candidate in other.candidates:
            name = candidate.evaluation.model.name
            if name in known:
                raise RequestError(f"{name} is in both {known[name]} and {path}: leave one out")
            known[name] = path
            candidates.append(candidate)
    return first.model_copy(update={"candidates": tuple(candidates)})


def _weights(sha256: str | None) -> dict[str, object]:
    return {"the base's weights": sha256 and sha256[:12]}


def _protocol(result: Evaluation) -> dict[str, object]:
    """What must agree, by what it is called in a message."""
    return {
        **_weights(result.model.sha256),
        "the documents": result.data.sha256[:12],
        "the tokenizer": result.data.tokenizer_sha256[:12],
        "the protocol": result.suite.protocol,
        "the context": result.suite.context,
        "the stride": result.suite.stride,
        "the computing type": result.environment.dtype,
    }


def _check_same(path: Path, found: Mapping[str, object], first: Path, wanted: Mapping[str, object]) -> None:
    for what, value in found.items():
        if value != wanted[what]:
            raise RequestError(f"{path} cannot stand beside {first}: {what}: {value} and {wanted[what]}")


def _listed(paths: Mapping[Path, object]) -> str:
    return ", ".join(map(str, paths)) or "nothing"
