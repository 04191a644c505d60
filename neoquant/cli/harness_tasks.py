"""`--task` of `eval` and `compare`: tasks of lm-evaluation-harness instead of text."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neoquant.cli.evaluation import (
    LoadOptions,
    fail_with,
    keeping_progress,
    load_compared_models,
    load_evaluated_model,
    publish,
)
from neoquant.cli.options import own_fields
from neoquant.cli.output import check_output_file, json_kind
from neoquant.cli.terminal import Terminal
from neoquant.errors import RequestError

if TYPE_CHECKING:
    from neoquant.evaluation.task_result import TaskComparison, TaskEvaluation
    from neoquant.evaluation.task_thresholds import TaskCondition

_OF_TEXT = ("suite", "data", "subset", "protocol", "stride", "exclude_calibrated")


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What `eval` and `compare` take to describe tasks, as it was typed."""

    task: list[str]
    task_path: Path | None
    fewshot: int | None
    documents: int | None
    context: int | None
    fail_if: list[str] | None
    json: Path | None
    force: bool
    revision: str | None


def task_options(params: Mapping[str, Any]) -> TaskOptions | None:
    """From the parameters of a verb by name; None where no task is asked for.

    Raises:
        RequestError: options of text stand beside --task, options of tasks without it, or under torchrun.
    """
    if not params["task"]:
        for name in ("task_path", "fewshot"):
            if params[name] is not None:
                raise RequestError(f"{_option(name)} is for tasks: name one with --task")
        return None
    for name in _OF_TEXT:
        if params[name]:
            raise RequestError(f"{_option(name)} is for text and --task for tasks: measure one, then the other")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RequestError("--task runs in one process: leave torchrun away")
    return TaskOptions(**own_fields(TaskOptions, params))


def run_tasks(asked: TaskOptions, names: Sequence[str | None], loading: LoadOptions, terminal: Terminal) -> None:
    """Evaluate the model, or compare the first of several with the others; every refusal before any is opened."""
    from neoquant.evaluation.task_thresholds import parse_task_condition, require_figures

    base, *others = names
    conditions = [parse_task_condition(text) for text in asked.fail_if or ()]
    kind = json_kind("task-comparison" if others else "task-evaluation")
    check_output_file(asked.json, kind, terminal, inputs=[asked.task_path, *names], force=asked.force)

    from neoquant.evaluation.harness import read_tasks
    from neoquant.evaluation.task_scores import compare_tasks, evaluate_tasks

    tasks = read_tasks(list(dict.fromkeys(asked.task)), asked.task_path, asked.fewshot, terminal.progress)
    require_figures(conditions, dict.fromkeys(metric for task in tasks for metric in task.metrics), bool(others))
    with keeping_progress(asked.json) as journal:
        if others:
            models = [str(name) for name in others]
            reference, compared, tokenizer = load_compared_models(str(base), asked.revision, models, loading, terminal)
        else:
            compared = []
            reference, tokenizer = load_evaluated_model(base, terminal, "eval", loading, asked.revision)
        results = evaluate_tasks(
            [reference, *compared],
            tokenizer,
            tasks,
            documents=asked.documents,
            context=asked.context,
            progress=terminal.progress,
            journal=journal,
        )
    _show(compare_tasks(results) if others else results[0], conditions, asked.json, terminal)


def compared_tasks(
    files: Sequence[str], json: Path | None, force: bool, fail_if: Sequence[str] | None, terminal: Terminal
) -> bool:
    """Compare saved results on tasks; False, and nothing is done, where the first file holds another kind of result.

    Raises:
        RequestError: another file is not of tasks, or results are not of the same documents.
    """
    from neoquant.evaluation.saved_results import is_task_result, read_task_result

    if not is_task_result(files[0]):
        return False
    check_output_file(json, json_kind("task-comparison"), terminal, inputs=list(files), force=force)

    from neoquant.evaluation.task_scores import compare_tasks
    from neoquant.evaluation.task_thresholds import parse_task_condition, require_figures

    conditions = [parse_task_condition(text) for text in fail_if or ()]
    results = [read_task_result(file) for file in files]
    metrics = [metric.name.partition(",")[0] for score in results[0].tasks for metric in score.metrics]
    require_figures(conditions, dict.fromkeys(metrics), compared=True)
    _show(compare_tasks(results, files), conditions, json, terminal)
    return True


def _show(
    result: TaskEvaluation | TaskComparison, conditions: list[TaskCondition], json: Path | None, terminal: Terminal
) -> None:
    from neoquant.evaluation.task_result import TaskComparison
    from neoquant.evaluation.task_thresholds import task_failures
    from neoquant.report.tasks import task_comparison_table, task_evaluation_table

    if isinstance(result, TaskComparison):
        notes = [note for evaluation in result.evaluations for note in evaluation.notes]
        publish(result, task_comparison_table(result), notes, json, terminal)
    else:
        publish(result, task_evaluation_table(result), result.notes, json, terminal)
    fail_with(task_failures(conditions, result), terminal)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
