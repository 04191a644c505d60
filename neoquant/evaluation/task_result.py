"""Results on tasks of lm-evaluation-harness, as frozen values that go to JSON and back (docs/evaluation.md)."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from neoquant.evaluation.result import Environment, ModelInfo, Record, from_json


class MetricScore(Record):
    """A metric that is a mean over documents, with its 95 % interval and what each document scored."""

    name: str  # lm-eval's: acc, acc_norm, ...; with the filter's name after a comma where there is one
    higher_is_better: bool
    value: float
    low: float | None
    high: float | None
    values: tuple[float, ...]  # of the documents, in the task's order


class TaskScore(Record):
    """What a model scored on one task."""

    task: str
    version: str | None  # of the task's definition
    source: str  # the data set that its definition names, and the configuration
    fewshot: int  # examples before each question
    documents: int
    sha256: str  # of every context and continuation that was scored, in order, and of the documents' targets
    metrics: tuple[MetricScore, ...]
    calibrated_on: int = 0  # how many of the documents the model was calibrated on, which flatters it

    @model_validator(mode="after")
    def _a_value_for_each_document(self) -> TaskScore:
        for metric in self.metrics:
            if len(metric.values) != self.documents:
                raise ValueError(f"{metric.name}: {len(metric.values)} values of {self.documents} documents")
        return self


class MeanScore(Record):
    """The plain mean over the tasks that have a metric: each counts alike however many documents it has."""

    metric: str
    tasks: int
    value: float
    low: float | None
    high: float | None


class TaskEvaluation(Record):
    """One model on one or more tasks."""

    schema_version: Literal["neoquant.task-evaluation/1"] = "neoquant.task-evaluation/1"
    model: ModelInfo
    environment: Environment
    lm_eval: str  # the harness's version
    tokenizer_sha256: str
    context: int  # tokens that are read before a prediction, at most
    tasks: tuple[TaskScore, ...]
    means: tuple[MeanScore, ...]
    notes: tuple[str, ...] = ()
    seconds: float
    created: str  # ISO 8601, UTC

    @classmethod
    def from_json(cls, text: str) -> TaskEvaluation:
        """Raises DataError for JSON that is not an evaluation on tasks of this schema version."""
        return from_json(cls, text)


class TaskChange(Record):
    """How far a metric lies above the reference's on the same documents."""

    task: str
    metric: str
    value: float
    low: float | None
    high: float | None
    gained: int  # documents that score higher than with the reference
    lost: int


class TaskCandidate(Record):
    """A model that was compared with the reference on tasks."""

    evaluation: TaskEvaluation
    changes: tuple[TaskChange, ...]  # in the order of the tasks' metrics
    means: tuple[MeanScore, ...]  # of the changes


class TaskComparison(Record):
    """Several models on the same tasks, each against the first."""

    schema_version: Literal["neoquant.task-comparison/1"] = "neoquant.task-comparison/1"
    reference: TaskEvaluation
    candidates: tuple[TaskCandidate, ...]

    @property
    def evaluations(self) -> tuple[TaskEvaluation, ...]:
        """The reference's, then those of the candidates."""
        return self.reference, *(candidate.evaluation for candidate in self.candidates)

    @classmethod
    def from_json(cls, text: str) -> TaskComparison:
        """Raises DataError for JSON that is not a comparison on tasks of this schema version."""
        return from_json(cls, text)
