"""What the models give back, by the names that transformers uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from neoquant.jax.cache import FlaxCache


@dataclass(frozen=True)
class FlaxBaseModelOutput:
    """`last_hidden_state[B, T, C]`; `hidden_states` of the embeddings and each layer, where asked for."""

    last_hidden_state: Any
    past_key_values: FlaxCache | None = None
    hidden_states: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class FlaxCausalLMOutput:
    """`logits[B, T, V]`; the rest as in `FlaxBaseModelOutput`."""

    logits: Any
    past_key_values: FlaxCache | None = None
    hidden_states: tuple[Any, ...] | None = None


for _output, _fields in (
    (FlaxBaseModelOutput, ("last_hidden_state", "past_key_values", "hidden_states")),
    (FlaxCausalLMOutput, ("logits", "past_key_values", "hidden_states")),
):
    jax.tree_util.register_dataclass(_output, _fields, ())
