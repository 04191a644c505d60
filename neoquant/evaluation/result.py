"""What an evaluation found, as frozen values that go to JSON and back with all that is needed to repeat it."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, computed_field

from neoquant.errors import DataError
from neoquant.evaluation.statistics import RESAMPLES, SEED
from neoquant.evaluation.suite import Suite

LN2 = math.log(2)


class Record(BaseModel):
    """Frozen; keys that a later version adds are ignored. What is derived is written to JSON and never read back."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class ModelInfo(Record):
    """Which model was evaluated, and what it costs to keep."""

    name: str
    source: str = ""  # hub id, or the folder's name without where it lay: sha256 says which weights these are
    revision: str | None = None  # commit
    bytes_on_disk: int | None = None
    bits_per_weight_linears: float | None = None
    bits_per_weight_model: float | None = None
    recipe: dict[str, Any] | None = None
    sha256: str | None = None  # of the weights


class Environment(Record):
    """What the figures were computed with."""

    neoquant: str
    torch: str
    python: str
    platform: str
    device: str
    dtype: str
    threads: int


class DataInfo(Record):
    """What the figures were computed on."""

    source: str
    revision: str | None  # commit of a hub data set, version of a standard library
    sha256: str  # of all documents in order: id, subset, text
    tokenizer_sha256: str


class Score(Record):
    """Summed over a subset, or over everything."""

    subset: str
    documents: int
    tokens: int  # scored
    bytes: int  # UTF-8
    nats: float  # -log p, summed

    @computed_field  # type: ignore[prop-decorator]
    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @computed_field  # type: ignore[prop-decorator]
    @property
    def perplexity(self) -> float:
        """Of a token."""
        return _exp(self.nats_per_token)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def bits_per_byte(self) -> float:
        return self.nats / self.bytes / LN2


class UnitScore(Record):
    """One document, or one window where documents were joined."""

    id: str
    subset: str
    tokens: int
    bytes: int
    nats: float


class Evaluation(Record):
    """One model on one suite."""

    schema_version: Literal["neoquant.evaluation/1"] = "neoquant.evaluation/1"
    model: ModelInfo
    suite: Suite  # with context and stride settled
    data: DataInfo
    environment: Environment
    total: Score
    subsets: tuple[Score, ...]
    units: tuple[UnitScore, ...]
    notes: tuple[str, ...] = ()
    seconds: float  # of reading and scoring; of all models together where several were compared
    created: str  # ISO 8601, UTC

    def to_json(self) -> str:
        return self.model_dump_json(indent=1)

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """Raises DataError for JSON that is not an evaluation of this schema version."""
        return from_json(cls, text)


class Change(Record):
    """How a model differs from the reference on the same windows: over a subset, or over everything."""

    subset: str
    nats_per_token: float  # above the reference's
    low: float | None  # 95 % interval of nats_per_token; None for fewer than two units
    high: float | None
    agreement: float  # share of tokens whose likeliest token is the reference's
    agreement_error: float | None  # standard error
    kl: float  # KL(reference || model), mean nats a token

    @computed_field  # type: ignore[prop-decorator]
    @property
    def perplexity_ratio(self) -> float:
        return _exp(self.nats_per_token)


class UnitChange(Record):
    """One document's (or window's) sums; its losses are in the evaluations."""

    id: str
    subset: str
    kl: float  # nats, summed
    agreed: int  # tokens


class Candidate(Record):
    """A model that was compared with the reference."""

    evaluation: Evaluation
    total: Change
    subsets: tuple[Change, ...]
    units: tuple[UnitChange, ...]


class Resampling(Record):
    """How the intervals were made."""

    unit: Literal["document", "window"]
    resamples: int = RESAMPLES
    seed: int = SEED
    confidence: float = 0.95


class Comparison(Record):
    """Several models on one suite, each against the first."""

    schema_version: Literal["neoquant.comparison/1"] = "neoquant.comparison/1"
    reference: Evaluation
    candidates: tuple[Candidate, ...]
    resampling: Resampling

    def to_json(self) -> str:
        return self.model_dump_json(indent=1)

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """Raises DataError for JSON that is not a comparison of this schema version."""
        return from_json(cls, text)


R = TypeVar("R", bound=Record)


def from_json(kind: type[R], text: str) -> R:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise DataError(f"not a saved {kind.__name__.lower()} of this version: {place}: {first['msg']}") from None


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
