"""What a forward pass returns: transformers' names, reached like its own: `out.logits`, `out["logits"]`, `out[0]`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from neoquant.model.cache import KVCache

RENAMED = {"cache": "past_key_values"}
"""transformers' names of fields since its version 5.24, which are found here as well."""


class ModelOutput(Mapping[str, Any]):
    """A record that is also a mapping of its fields, in order, without those that are None; numbers count the same."""

    def __post_init__(self) -> None:
        """A mapping in the first place stands for all fields: so accelerate makes an output of another's items."""
        first = fields(self)[0].name  # type: ignore[arg-type]  # subclasses are dataclasses
        given = getattr(self, first)
        if isinstance(given, Mapping):
            setattr(self, first, None)
            for name, value in given.items():
                self[name] = value

    @property
    def cache(self) -> KVCache | None:
        """What `past_key_values` is called since transformers 5.24."""
        cache: KVCache | None = getattr(self, RENAMED["cache"])
        return cache

    def __iter__(self) -> Iterator[str]:
        names = (f.name for f in fields(self))  # type: ignore[arg-type]  # subclasses are dataclasses
        return (name for name in names if getattr(self, name) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, key: int | slice | str) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        key = RENAMED.get(key, key)
        if key not in list(self):
            raise KeyError(key)
        return getattr(self, key)

    def __setitem__(self, key: str, value: Any) -> None:
        key = RENAMED.get(key, key)
        if key not in [f.name for f in fields(self)]:  # type: ignore[arg-type]
            raise KeyError(key)
        setattr(self, key, value)

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        return tuple(getattr(self, name) for name in self)


@dataclass
class BaseModelOutput(ModelOutput):
    """`last_hidden_state[B, T, C]`, after the final norm; `hidden_states`: the embeddings and every block's output;
    `attentions`: every block's weights `[B, H, T, S]`, behind the dropout."""

    last_hidden_state: Tensor
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class CausalLMOutput(ModelOutput):
    """`logits[B, T, V]`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class SequenceClassifierOutput(ModelOutput):
    """`logits[B, labels]`, of the last token that is not padding."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class TokenClassifierOutput(ModelOutput):
    """`logits[B, T, labels]`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class QuestionAnsweringModelOutput(ModelOutput):
    """`start_logits[B, T]` and `end_logits[B, T]`."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
