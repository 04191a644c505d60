"""Models on tasks of lm-evaluation-harness: what each scores, and how each differs from a reference."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from neoquant.errors import RequestError, locate
from neoquant.evaluation.answers import Answers
from neoquant.evaluation.harness import HarnessTask, harness_version, run_task
from neoquant.evaluation.perplexity import EvaluatedModel, environment
from neoquant.evaluation.proportions import mean_of_intervals, paired_interval
from neoquant.evaluation.statistics import ConfidenceInterval
from neoquant.evaluation.task_result import (
    MeanScore,
    MetricScore,
    TaskCandidate,
    TaskChange,
    TaskComparison,
    TaskEvaluation,
    TaskScore,
)
from neoquant.progress import SILENT, Progress
from neoquant.sizes import plural


def evaluate_tasks(
    evaluated: Sequence[EvaluatedModel],
    tokenizer: Any,
    tasks: Sequence[HarnessTask],
    *,
    documents: int | None = None,
    context: int | None = None,
    progress: Progress = SILENT,
    journal: Path | None = None,
) -> tuple[TaskEvaluation, ...]:
    """What each model scores on each task's first `documents`, read with one tokenizer.

    `context` bounds the tokens that are read before a prediction, which are else the positions that all models have.
    `journal` names a file for the progress: the same call resumes from it after an interruption.

    Raises RequestError (a context longer than the models', another model's tokenizer), DataError (a task that fails on
    a document), OutputError (the journal).
    """
    positions = min(int(entry.model.config.max_position_embeddings) for entry in evaluated)
    if context is not None and not 0 < context <= positions:
        raise RequestError(f"a context of {plural(context, 'token')}: the model has {plural(positions, 'position')}")
    context = context or positions
    answers = Answers(journal, _key(evaluated, tokenizer, context))
    return tuple(
        _evaluation(entry, number, tokenizer, tasks, documents, context, answers, progress)
        for number, entry in enumerate(evaluated)
    )


def _evaluation(
    entry: EvaluatedModel,
    number: int,
    tokenizer: Any,
    tasks: Sequence[HarnessTask],
    documents: int | None,
    context: int,
    answers: Answers,
    progress: Progress,
) -> TaskEvaluation:
    from neoquant.evaluation.harness_model import HarnessModel

    started = time.perf_counter()
    lm = HarnessModel(entry.model, tokenizer, context=context, answers=answers, number=number, progress=progress)
    scores = tuple(run_task(task, lm, documents, entry.calibrated_on) for task in tasks)
    return TaskEvaluation(
        model=entry.describe,
        environment=environment(entry.model),
        lm_eval=harness_version(),
        tokenizer_sha256=tokenizer.sha256,
        context=context,
        tasks=scores,
        means=_means([(m.name, m.value, _interval(m)) for score in scores for m in score.metrics]),
        notes=_notes(entry.describe.name, tasks, scores),
        seconds=time.perf_counter() - started,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _key(evaluated: Sequence[EvaluatedModel], tokenizer: Any, context: int) -> str:
    """A hash of all that an answer depends on, but for the text."""
    ours = environment(evaluated[0].model)
    models = [(e.describe.sha256, e.describe.name, str(e.model.dtype), e.model.device.type) for e in evaluated]
    parts = (models, tokenizer.sha256, context, ours.neoquant, ours.torch, ours.platform, ours.native)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def compare_tasks(results: Sequence[TaskEvaluation], names: Sequence[str] = ()) -> TaskComparison:
    """Every result against the first one's model, document by document. `names` are the files of the results, if any.

    Raises RequestError, naming the difference, where results are of different documents, contexts or tokenizers.
    """
    reference, *others = results
    if not others:
        raise RequestError(f"{names[0] if names else 'the result'} holds one model: name a second one to compare")
    candidates = []
    for number, other in enumerate(others, 1):
        with locate(names[number] if names else other.model.name):
            _require_same(reference, other)
        candidates.append(_candidate(reference, other))
    return TaskComparison(reference=reference, candidates=tuple(candidates))


def _require_same(reference: TaskEvaluation, other: TaskEvaluation) -> None:
    def described(result: TaskEvaluation) -> dict[str, object]:
        return {
            "tasks": ", ".join(score.task for score in result.tasks),
            "context": result.context,
            "tokenizer (sha256)": result.tokenizer_sha256[:12],
            **{f"examples before questions of {score.task}": score.fewshot for score in result.tasks},
            **{f"documents of {score.task} (sha256)": score.sha256[:12] for score in result.tasks},
            **{f"metrics of {score.task}": ", ".join(m.name for m in score.metrics) for score in result.tasks},
        }

    ours, theirs = described(reference), described(other)
    differences = [
        f"{what} {theirs[what]}, not {value}" for what, value in ours.items() if theirs.get(what, value) != value
    ]
    if differences:
        raise RequestError(f"not measured as {reference.model.name} was: {'; '.join(differences)}")


def _candidate(reference: TaskEvaluation, other: TaskEvaluation) -> TaskCandidate:
    changes = tuple(
        _change(before.task, base, metric)
        for before, after in zip(reference.tasks, other.tasks, strict=True)
        for base, metric in zip(before.metrics, after.metrics, strict=True)
    )
    means = _means([(change.metric, change.value, _interval(change)) for change in changes])
    return TaskCandidate(evaluation=other, changes=changes, means=means)


def _change(task: str, before: MetricScore, after: MetricScore) -> TaskChange:
    interval = paired_interval(before.values, after.values)
    pairs = list(zip(before.values, after.values, strict=True))
    return TaskChange(
        task=task,
        metric=before.name,
        value=math.fsum(b - a for a, b in pairs) / len(pairs),
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        gained=sum(b > a for a, b in pairs),
        lost=sum(b < a for a, b in pairs),
    )


def _interval(figure: MetricScore | TaskChange) -> ConfidenceInterval | None:
    return None if figure.low is None or figure.high is None else ConfidenceInterval(figure.low, figure.high)


def _means(figures: Sequence[tuple[str, float, ConfidenceInterval | None]]) -> tuple[MeanScore, ...]:
    """The mean over tasks of each metric that two of them have at least."""
    found = []
    for metric in dict.fromkeys(name for name, *_ in figures):
        values = [value for name, value, _ in figures if name == metric]
        interval = mean_of_intervals(values, [i for name, _, i in figures if name == metric])
        if len(values) > 1:
            found.append(
                MeanScore(
                    metric=metric,
                    tasks=len(values),
                    value=math.fsum(values) / len(values),
                    low=interval.low if interval else None,
                    high=interval.high if interval else None,
                )
            )
    return tuple(found)


def _notes(model: str, tasks: Sequence[HarnessTask], scores: Sequence[TaskScore]) -> tuple[str, ...]:
    notes = [
        f"{task.name}: {', '.join(task.left_out)} left out, since no mean over documents"
        for task in tasks
        if task.left_out
    ]
    notes += [
        f"{model} was calibrated on {score.calibrated_on} of the {plural(score.documents, 'document')} of "
        f"{score.task}: its figures flatter it"
        for score in scores
        if score.calibrated_on
    ]
    return tuple(notes)
