"""Results of evaluations, as frozen values that go to JSON and back with all that is needed to repeat them.

docs/evaluation.md describes the JSON field by field. A field that is added keeps the schema's version; one whose
meaning changes, or that goes, raises it.
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, computed_field, field_validator, model_validator
from pydantic_core import PydanticSerializationError, to_json

from neoquant.data.suite import Suite
from neoquant.errors import DataError
from neoquant.files.names import as_text

LN2 = math.log(2)
QUANTILES = ("0.1", "1", "5", "10", "25", "50", "75", "90", "95", "99", "99.9")  # per cent


class Record(BaseModel):
    """Frozen; keys that a later version adds are ignored. What is derived is written to JSON and never read back."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    def to_json(self) -> str:
        """Names of files and folders need not be UTF-8, and JSON is: what is not is escaped."""
        try:
            return self.model_dump_json(indent=1)
        except PydanticSerializationError:
            return to_json(_as_text(self.model_dump(mode="json")), indent=1, inf_nan_mode="null").decode()


def _as_text(value: Any) -> Any:
    """Plain values whose every text is one that UTF-8 can hold."""
    if isinstance(value, dict):
        return {as_text(key): _as_text(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_as_text(inner) for inner in value]
    return as_text(value) if isinstance(value, str) else value


class ModelInfo(Record):
    """Which model was evaluated, and its size."""

    name: str
    source: str = ""  # hub id, or the folder's name without where it lay: sha256 says which weights these are
    revision: str | None = None  # commit
    bytes_on_disk: int | None = None
    bits_per_weight_linears: float | None = None
    bits_per_weight_model: float | None = None
    parameters: int | None = None
    format: str | None = None  # of quantized weights; None for a model that is not quantized
    activations: str = "exact"  # or the type that they were rounded to before products with quantized weights
    recipe: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None  # calibration samples: source, sha256, rows, length, seed
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
    processor: str | None = None  # the CPU's name
    native: str | None = None  # which instruction set the native library uses, or why none
    tokenizers: str | None = None  # the version of the library


class DataInfo(Record):
    """What the figures were computed on."""

    source: str
    revision: str | None  # commit of a hub data set, version of a standard library
    sha256: str  # of all documents in order: id, subset, text
    tokenizer_sha256: str
    excluded: int = 0  # documents left out because a model was calibrated on them


class Score(Record):
    """Summed over a subset, or over everything."""

    subset: str
    documents: int
    tokens: int  # scored
    bytes: int  # UTF-8
    nats: float  # -log p, summed
    words: int | None = None  # where documents are scored whole, or their last word is
    correct: int | None = None  # documents whose last word was predicted, in the last-word protocol

    @computed_field  # type: ignore[prop-decorator]
    @property
    def word_perplexity(self) -> float | None:
        """What lm-evaluation-harness reports for WikiText, and as perplexity for LAMBADA."""
        return _exp(self.nats / self.words) if self.words else None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def accuracy(self) -> float | None:
        return None if self.correct is None else self.correct / self.documents

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


class Macro(Record):
    """The plain means over subsets, each of which counts alike however much text it holds."""

    nats_per_token: float
    bits_per_byte: float

    @computed_field  # type: ignore[prop-decorator]
    @property
    def perplexity(self) -> float:
        """exp of the mean: the subsets' geometric mean."""
        return _exp(self.nats_per_token)


class UnitScore(Record):
    """One document, or one window where documents were joined."""

    id: str
    subset: str
    tokens: int
    bytes: int
    nats: float
    words: int | None = None
    correct: bool | None = None  # whether every token of its last word was the likeliest


class Evaluation(Record):
    """One model on one suite."""

    schema_version: Literal["neoquant.evaluation/2"] = "neoquant.evaluation/2"
    model: ModelInfo
    suite: Suite  # with the context and stride that were used
    data: DataInfo
    environment: Environment
    total: Score  # of all text together
    macro: Macro
    subsets: tuple[Score, ...]
    units: tuple[UnitScore, ...]
    calibrated_on: int = 0  # how many of these documents the model was calibrated on, which flatters it
    notes: tuple[str, ...] = ()
    seconds: float  # of reading and scoring; of all models together where several were compared
    created: str  # ISO 8601, UTC

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """Raises DataError for JSON that is not an evaluation of this schema version."""
        return from_json(cls, text)


class Histogram(Record):
    """Tokens by value: `counts[i]` lie in [edges[i], edges[i + 1]), the rest `below` the first edge or `above`."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    below: int
    above: int

    @model_validator(mode="after")
    def _counts_between_edges(self) -> Histogram:
        if len(self.counts) + 1 != len(self.edges):
            raise ValueError(f"{len(self.counts)} counts between {len(self.edges)} edges")
        return self


class Distribution(Record):
    """A distribution over tokens. Mean, RMS and extremes are exact, quantiles right to 0.25 % of their value
    (`quantile_sketch.RELATIVE_ACCURACY`)."""

    mean: float
    rms: float
    minimum: float
    maximum: float
    quantiles: dict[str, float]  # "99.9" -> the value that 99.9 % of the tokens do not exceed; see QUANTILES
    histogram: Histogram | None = None  # in the total only

    @field_validator("quantiles")
    @classmethod
    def _complete(cls, value: dict[str, float]) -> dict[str, float]:
        if missing := [q for q in QUANTILES if q not in value]:
            raise ValueError(f"lacks {', '.join(missing)}")
        return value

    @property
    def median(self) -> float:
        return self.quantiles["50"]


class Change(Record):
    """How a model differs from the reference on the same windows: over a subset, or over everything.

    Intervals (`low` to `high`) hold 95 %, errors are standard errors, kept for other readers; both are None for fewer
    than two units. What needs both models' predictions side by side (agreement and everything below it) is None where
    saved evaluations were compared.
    """

    subset: str
    nats_per_token: float  # above the reference's
    low: float | None  # interval of nats_per_token
    high: float | None
    bits_per_byte: float  # above the reference's
    bits_per_byte_low: float | None
    bits_per_byte_high: float | None
    accuracy: float | None = None  # above the reference's, and its interval, where last words are scored
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    agreement: float | None = None  # share of tokens whose likeliest token is the reference's
    agreement_low: float | None = None
    agreement_high: float | None = None
    agreement_error: float | None = None
    kl: float | None = None  # KL(reference || model), mean nats a token
    kl_low: float | None = None
    kl_high: float | None = None
    kl_error: float | None = None
    divergence: Distribution | None = None  # of KL, nats
    loss_change: Distribution | None = None  # of -log p(token) above the reference's, nats
    probability_change: Distribution | None = None  # of p(token) above the reference's, -1 to 1

    @computed_field  # type: ignore[prop-decorator]
    @property
    def perplexity_ratio(self) -> float:
        """The model's over the reference's; its interval is exp of `low` to exp of `high`."""
        return _exp(self.nats_per_token)


class MacroChange(Record):
    """The plain means of the subsets' changes; for the intervals, documents are drawn within each subset."""

    nats_per_token: float
    low: float | None
    high: float | None
    bits_per_byte: float
    bits_per_byte_low: float | None
    bits_per_byte_high: float | None
    kl: float | None = None
    agreement: float | None = None


class UnitChange(Record):
    """One document's (or window's) sums; its losses are in the evaluations."""

    id: str
    subset: str
    kl: float  # nats, summed
    kl_maximum: float
    agreed: int  # tokens
    probability_squares: float  # squared changes of p(token), summed


class TokenChange(Record):
    """A token in a passage. One that ends inside a character has no text, the one that completes it has it all.

    Bytes that are no UTF-8 are escaped, as `\\xe2`.
    """

    text: str
    loss_change: float | None  # -log p(token) above the reference's, nats; None where the window does not score it
    kl: float | None


class Choice(Record):
    """A token, and the probability that a model gives it. Bytes that are no UTF-8 are escaped, as `\\xe2`."""

    text: str
    probability: float


class WorstToken(Record):
    """A token where a model differs from the reference the most, in its text."""

    unit: str  # id of the document
    subset: str
    position: int  # number of the token in its document (or window), from 0
    token: str
    kl: float  # nats
    probability_reference: float  # of the token
    probability: float
    top_reference: Choice  # the first of top_tokens_reference
    top: Choice
    top_tokens_reference: tuple[Choice, ...] = ()  # the likeliest three, the likeliest first; empty in older results
    top_tokens: tuple[Choice, ...] = ()
    passage: tuple[TokenChange, ...]  # the text around it
    index: int  # the token is passage[index]

    @property
    def before(self) -> str:
        """The passage up to the token."""
        return "".join(change.text for change in self.passage[: self.index])

    @property
    def after(self) -> str:
        return "".join(change.text for change in self.passage[self.index + 1 :])


class WorstDocument(Record):
    """A document (or window) on which a model differs from the reference the most."""

    unit: str
    subset: str
    tokens: int
    nats_per_token: float  # above the reference's
    kl: float  # mean nats a token
    beginning: str  # of its text


class Candidate(Record):
    """A model that was compared with the reference."""

    evaluation: Evaluation
    total: Change
    macro: MacroChange
    subsets: tuple[Change, ...]
    units: tuple[UnitChange, ...] = ()
    worst_documents: tuple[WorstDocument, ...] = ()  # by KL a token, the short ones left out
    worst_tokens: tuple[WorstToken, ...] = ()  # by KL, one in a stretch of text


class Resampling(Record):
    """How the intervals were made: `unit`s were left out one at a time (docs/evaluation.md)."""

    method: Literal["jackknife"] = "jackknife"
    unit: Literal["document", "window"]
    confidence: float = 0.95


class Comparison(Record):
    """Several models on one suite, each against the first."""

    schema_version: Literal["neoquant.comparison/2"] = "neoquant.comparison/2"
    reference: Evaluation
    candidates: tuple[Candidate, ...]
    resampling: Resampling

    @model_validator(mode="after")
    def _same_subsets(self) -> Comparison:
        names = [score.subset for score in self.reference.subsets]
        for candidate in self.candidates:
            for found in (candidate.subsets, candidate.evaluation.subsets):
                if [part.subset for part in found] != names:
                    raise ValueError(f"{candidate.evaluation.model.name} has other subsets than the reference")
        return self

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """The reference's, then those of the candidates."""
        return self.reference, *(candidate.evaluation for candidate in self.candidates)

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """Raises DataError for JSON that is not a comparison of this schema version.

        Intervals that a former version did not write are computed from the documents' sums, where these are there.
        """
        return with_intervals(from_json(cls, text))


def with_intervals(result: Comparison) -> Comparison:
    """The comparison with the intervals of KL and agreement of every candidate that lacks them and lists its units."""
    candidates = tuple(_with_intervals(candidate) for candidate in result.candidates)
    return result.model_copy(update={"candidates": candidates})


def _with_intervals(candidate: Candidate) -> Candidate:
    rows = list(zip(candidate.units, candidate.evaluation.units, strict=False))
    if candidate.total.kl is None or candidate.total.kl_low is not None or len(rows) < 2:
        return candidate
    import torch

    from neoquant.evaluation.prediction_intervals import prediction_intervals

    def completed(change: Change, subset: str | None) -> Change:
        sums = [(u.kl, u.agreed, s.tokens) for u, s in rows if s.tokens and subset in (None, u.subset)]
        columns = torch.tensor(sums, dtype=torch.float64).reshape(-1, 3).T
        return change.model_copy(update=dict(prediction_intervals(*columns)))

    return candidate.model_copy(
        update={
            "total": completed(candidate.total, None),
            "subsets": tuple(completed(change, change.subset) for change in candidate.subsets),
        }
    )


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
