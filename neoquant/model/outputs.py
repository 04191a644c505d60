"""What a forward pass returns: transformers' names, reached like its own: `out.logits`, `out["logits"]`, `out[0]`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from neoquant.model.cache import KVCache


class ModelOutput:
    """A record whose fields can also be reached by position, counting only those that are not None."""

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        values = (getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]  # subclasses are dataclasses
        return tuple(value for value in values if value is not None)

    def __getitem__(self, key: int | slice | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]


@dataclass
class BaseModelOutput(ModelOutput):
    """`last_hidden_state[B, T, C]`, after the final norm; `hidden_states`: the embeddings and every block's output."""

    last_hidden_state: Tensor
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class CausalLMOutput(ModelOutput):
    """`logits[B, T, V]`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class SequenceClassifierOutput(ModelOutput):
    """`logits[B, labels]`, of the last token that is not padding."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class TokenClassifierOutput(ModelOutput):
    """`logits[B, T, labels]`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class QuestionAnsweringModelOutput(ModelOutput):
    """`start_logits[B, T]` and `end_logits[B, T]`."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
