"""Results on tasks of lm-evaluation-harness: tables for a terminal, and the rows of Markdown's and the page's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.text import Text

from neoquant.evaluation.task_result import MeanScore, TaskChange, TaskComparison, TaskEvaluation
from neoquant.report.escaping import escape_controls
from neoquant.report.formatting import NONE, duration, signed
from neoquant.report.split_table import Column, SplitTable
from neoquant.sizes import plural

MEAN = "mean of {} tasks"


class TaskRow(NamedTuple):
    """A metric of a task, or of the mean over tasks, as text; `after` and what follows it of a candidate."""

    task: str
    metric: str
    documents: str
    before: str
    after: str
    change: str
    interval: str
    gained: str
    lost: str
    total: bool = False


def task_evaluation_table(result: TaskEvaluation) -> RenderableType:
    """What one model scored: a line for each metric of each task, the means at the end."""
    scores = [(score, metric) for score in result.tasks for metric in score.metrics]
    columns = [
        Column("metric", [*(m.name for _, m in scores), *(m.metric for m in result.means)], "left"),
        Column("docs", [*(f"{s.documents:,}" for s, _ in scores), *("" for _ in result.means)]),
        Column("few-shot", [*(str(s.fewshot) for s, _ in scores), *("" for _ in result.means)]),
        Column(
            "score [95 %]",
            [
                *(_with_interval(m.value, m.low, m.high) for _, m in scores),
                *(_with_interval(m.value, m.low, m.high) for m in result.means),
            ],
        ),
    ]
    names = [*(score.task for score, _ in scores), *(MEAN.format(mean.tasks) for mean in result.means)]
    return Group(
        Text(escape_controls(f"{result.model.name} on {plural(len(result.tasks), 'task')}")),
        SplitTable("task", names, columns),
        Text(task_provenance(result), style="dim"),
    )


def task_comparison_table(result: TaskComparison) -> RenderableType:
    """How each candidate's scores differ from the reference's, a table each."""
    sections: list[RenderableType] = []
    for candidate in result.candidates:
        rows = [row for name, row in task_rows(result) if name == candidate.evaluation.model.name]
        title = f"{candidate.evaluation.model.name} against {result.reference.model.name}"
        columns = [
            Column("metric", [row.metric for row in rows], "left"),
            Column("docs", [row.documents for row in rows]),
            Column("score", [f"{row.before} → {row.after}" for row in rows]),
            Column("Δ [95 %]", [f"{row.change} [{row.interval}]" for row in rows]),
            Column("gained", [row.gained for row in rows]),
            Column("lost", [row.lost for row in rows]),
        ]
        sections += [
            Text(escape_controls(title), style="bold"),
            SplitTable("task", [row.task for row in rows], columns),
            Text(),
        ]
    legend = f"Δ: points of 100 · gained, lost: documents\n{task_provenance(result.reference)}"
    return Group(*sections, Text(legend, style="dim"))


def task_rows(result: TaskComparison) -> Iterator[tuple[str, TaskRow]]:
    """The name of each candidate with each of its rows: metric by metric, then the means."""
    befores = [(score, metric) for score in result.reference.tasks for metric in score.metrics]
    for candidate in result.candidates:
        name = candidate.evaluation.model.name
        afters = [metric for score in candidate.evaluation.tasks for metric in score.metrics]
        for (score, before), after, change in zip(befores, afters, candidate.changes, strict=True):
            yield (
                name,
                TaskRow(
                    score.task,
                    before.name,
                    f"{score.documents:,}",
                    percent(before.value),
                    percent(after.value),
                    *_changed(change),
                    f"{change.gained:,}",
                    f"{change.lost:,}",
                ),
            )
        means = zip(result.reference.means, candidate.evaluation.means, candidate.means, strict=True)
        for before_mean, after_mean, mean in means:
            values = (percent(before_mean.value), percent(after_mean.value))
            yield name, TaskRow(MEAN.format(mean.tasks), mean.metric, "", *values, *_changed(mean), "", "", True)


def task_provenance(result: TaskEvaluation) -> str:
    """One line: with what."""
    machine = result.environment
    shots = sorted({score.fewshot for score in result.tasks})
    return (
        f"lm-eval {result.lm_eval}, {'/'.join(map(str, shots))}-shot, context {result.context}, {machine.dtype} on "
        f"{machine.device}, {duration(result.seconds)}"
    )


def percent(value: float) -> str:
    """`57.23`: of 100."""
    return f"{100 * value:.2f}"


def _with_interval(value: float, low: float | None, high: float | None) -> str:
    between = NONE if low is None or high is None else f"{percent(low)}, {percent(high)}"
    return f"{percent(value)} [{between}]"


def _changed(change: TaskChange | MeanScore) -> tuple[str, str]:
    if change.low is None or change.high is None:
        return signed(100 * change.value, 2), NONE
    return signed(100 * change.value, 2), f"{signed(100 * change.low, 2)}, {signed(100 * change.high, 2)}"
