"""Saved results brought together for one report: only what was measured alike may stand side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from neoquant.benchmark.run import Speed
from neoquant.errors import DataError, RequestError, locate
from neoquant.evaluation.inspection_result import Inspection
from neoquant.evaluation.result import Comparison, Evaluation, from_json
from neoquant.evaluation.task_result import TaskComparison
from neoquant.files.reading import MAX_LARGE_BYTES, parse_json, read_text
from neoquant.report.measured_speed import NO_SPEED, MeasuredSpeed, measured_speed


class Gathered(NamedTuple):
    """Every candidate against one reference, the inspections of some of them, the speed of some models, and scores on
    tasks."""

    comparison: Comparison
    inspections: tuple[Inspection, ...]
    speed: MeasuredSpeed = NO_SPEED
    tasks: tuple[TaskComparison, ...] = ()


def gather(files: Sequence[Path]) -> Gathered:
    """Read comparisons, inspections, benchmarks and scores on tasks, and make one comparison of all candidates.

    Raises:
        DataError: a file is not one of these, in this version's schema.
        RequestError: there is no comparison, a candidate or a benchmark's model comes twice, or base, data, protocol or
            the benchmarks' settings differ.
    """
    comparisons: dict[Path, Comparison] = {}
    inspections: dict[Path, Inspection] = {}
    benchmarks: dict[str, Speed] = {}
    tasks: dict[Path, TaskComparison] = {}
    for path in files:
        found = _read(path)
        if isinstance(found, Comparison):
            comparisons[path] = found
        elif isinstance(found, Inspection):
            inspections[path] = found
        elif isinstance(found, TaskComparison):
            tasks[path] = found
        else:
            benchmarks[str(path)] = found
    if not comparisons:
        listed = ", ".join(map(str, files)) or "nothing"
        raise RequestError(f"{listed}: no comparison: make one with neoquant compare ... --json")
    merged = _merge(comparisons)
    bases = {path: inspection.base for path, inspection in inspections.items()}
    bases |= {path: result.reference.model for path, result in tasks.items()}
    for path, base in bases.items():
        first = next(iter(comparisons))
        _check_same(path, _weights(base.sha256), first, _weights(merged.reference.model.sha256))
    return Gathered(merged, tuple(inspections.values()), measured_speed(benchmarks), tuple(tasks.values()))


def _read(path: Path) -> Comparison | Inspection | TaskComparison | Speed:
    text = read_text(path, limit=MAX_LARGE_BYTES, error=DataError)
    try:
        fields = dict(parse_json(text))
    except (ValueError, TypeError):
        raise DataError(f"{path} is not a result of neoquant: no JSON object") from None
    schema = str(fields.get("schema_version"))
    kind = schema.partition("/")[0]
    if "schema_version" not in fields and {"programs", "prompt_tokens"} <= fields.keys():
        kind = "neoquant.benchmark"  # as versions before the field wrote it
    readers: dict[str, Callable[[str], Comparison | Inspection | TaskComparison | Speed]] = {
        "neoquant.comparison": Comparison.from_json,
        "neoquant.inspection": Inspection.from_json,
        "neoquant.task-comparison": TaskComparison.from_json,
        "neoquant.benchmark": lambda text: from_json(Speed, text),
    }
    if kind in readers:
        with locate(str(path)):
            return readers[kind](text)
    if kind in ("neoquant.evaluation", "neoquant.task-evaluation"):
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
