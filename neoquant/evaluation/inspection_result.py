"""What an inspection found, layer by layer: frozen values that go to JSON and back."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import computed_field

from neoquant.data.suite import Suite
from neoquant.evaluation.result import DataInfo, Environment, ModelInfo, Record, from_json


class Loss(Record):
    """What the base model loses with one layer quantized, or with all: nats a token, on the same windows."""

    nats_per_token: float  # above the base model's
    low: float | None  # 95 % interval of nats_per_token, over windows; None for fewer than two windows
    high: float | None
    kl: float  # KL(base || model), mean
    kl_low: float | None = None  # its 95 % interval; None in older results
    kl_high: float | None = None


class Layer(Record):
    """One block linear. Errors are relative mean squares: sum (w' - w)^2 / sum w^2."""

    block: int
    projection: str  # one of model.names.BLOCK_LINEARS
    attention: str  # of its block: "global" or "local"
    shape: tuple[int, int]  # O, I
    grid: dict[str, Any] | None  # None: not quantized
    weight_error: float
    output_error: float  # of weight @ input, on the base model's inputs; the bias is no part of it
    loss: Loss | None  # with this layer alone quantized; None where it was not asked for

    @computed_field  # type: ignore[prop-decorator]
    @property
    def name(self) -> str:
        return f"transformer.h.{self.block}.{self.projection}"


class Inspection(Record):
    """A model's block linears against those it was made from."""

    schema_version: Literal["neoquant.inspection/1"] = "neoquant.inspection/1"
    model: ModelInfo
    base: ModelInfo
    suite: Suite  # with context and stride settled
    data: DataInfo
    environment: Environment
    windows: int
    tokens: int  # scored positions, on which outputs and losses were measured
    layers: tuple[Layer, ...]  # by block, then in the order of model.names.BLOCK_LINEARS
    together: Loss  # of the whole model
    calibrated_on: int = 0  # how many of the suite's documents the model was calibrated on, which flatters it
    notes: tuple[str, ...] = ()
    seconds: float
    created: str  # ISO 8601, UTC

    @classmethod
    def from_json(cls, text: str) -> Inspection:
        """Raises DataError for JSON that is not an inspection of this schema version."""
        return from_json(cls, text)
