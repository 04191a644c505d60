"""Conditions on results on tasks, for scripts that must stop when a model lost too much: `delta_acc < -0.02`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from neoquant.errors import RequestError
from neoquant.evaluation.task_result import MeanScore, MetricScore, TaskChange, TaskComparison, TaskEvaluation
from neoquant.evaluation.thresholds import ANY, OPERATORS, split_condition

CHANGE = "delta_"
"""Before a metric: how far it lies above the reference's."""

ENDS = {"": "value", "_low": "low", "_high": "high"}
"""Behind a metric: nothing, or an end of its 95 % interval."""


class TaskCondition(NamedTuple):
    """`figure` `symbol` `limit`, of the mean over tasks (or the one task there is), or of any task."""

    figure: str
    symbol: str
    limit: float
    any_task: bool

    def __str__(self) -> str:
        return f"{ANY if self.any_task else ''}{self.figure} {self.symbol} {self.limit:g}"


def parse_task_condition(text: str) -> TaskCondition:
    """Raises RequestError for what is not a condition, with what would be one."""
    parts = split_condition(text, r"[\w.,-]+")
    if parts is not None:
        return TaskCondition(*parts)
    raise RequestError(f"--fail-if {text!r}: write it like '{CHANGE}acc < -0.02' or '{ANY}{CHANGE}acc_high < 0'")


def require_figures(conditions: Iterable[TaskCondition], metrics: Collection[str], compared: bool) -> None:
    """Raise RequestError for a condition on what no task has, or only a comparison; `metrics` are lm-eval's names."""
    begins = ("", CHANGE) if compared else ("",)
    for condition in conditions:
        plain = re.sub(r",[^_]*", "", condition.figure)  # a filter's name, which is known when there are results
        if plain not in (f"{begin}{metric}{end}" for begin in begins for metric in metrics for end in ENDS):
            ends = f"each also with {' and '.join(filter(None, ENDS))}"
            has = ", ".join(f"{begin}{metric}" for begin in begins for metric in metrics)
            raise RequestError(f"--fail-if {str(condition)!r}: these tasks have {has}; {ends}")


def task_failures(conditions: Iterable[TaskCondition], result: TaskEvaluation | TaskComparison) -> list[str]:
    """Every condition that holds for a model, a line each; of a comparison, for a candidate.

    Raises RequestError where a result has no such figure.
    """
    lines = []
    for condition in conditions:
        for model, figures in _models(result, condition.any_task):
            found = [(place, value) for name, place, value in figures if name == condition.figure]
            if not found:
                raise RequestError(f"{condition}: the result of {model} has no {condition.figure}")
            lines += [
                f"{model}, {place}: {condition.figure} {value:.6g} {condition.symbol} {condition.limit:g}"
                for place, value in found
                if OPERATORS[condition.symbol](value, condition.limit)
            ]
    return lines


Figure = tuple[str, str, float]
"""The name of a figure, what it is of, and its value."""


def _models(result: TaskEvaluation | TaskComparison, any_task: bool) -> Iterator[tuple[str, list[Figure]]]:
    """The names of the models that conditions are about, each with its figures."""
    if isinstance(result, TaskEvaluation):
        yield result.model.name, _figures("", _scores(result), result.means, any_task)
        return
    for candidate in result.candidates:
        own = candidate.evaluation
        changes = [(change.metric, change.task, change) for change in candidate.changes]
        figures = _figures("", _scores(own), own.means, any_task)
        yield own.model.name, figures + _figures(CHANGE, changes, candidate.means, any_task)


def _scores(result: TaskEvaluation) -> list[tuple[str, str, MetricScore]]:
    return [(metric.name, score.task, metric) for score in result.tasks for metric in score.metrics]


def _figures(
    begin: str,
    of_tasks: list[tuple[str, str, MetricScore]] | list[tuple[str, str, TaskChange]],
    means: Iterable[MeanScore],
    any_task: bool,
) -> list[Figure]:
    found: list[tuple[str, str, MetricScore | TaskChange | MeanScore]] = [*of_tasks]
    if not any_task:  # a metric that one task has needs no mean
        averaged = {mean.metric: mean for mean in means}
        found = [each for each in found if each[0] not in averaged]
        found += [(metric, f"mean of {mean.tasks} tasks", mean) for metric, mean in averaged.items()]
    figures = (
        (f"{begin}{name}{end}", place, getattr(one, field)) for name, place, one in found for end, field in ENDS.items()
    )
    return [(name, place, value) for name, place, value in figures if value is not None]
