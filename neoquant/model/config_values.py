"""Which values `config.json` may hold: types, ranges, and sizes that could be a model's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from neoquant.errors import ConfigError

MAX_SIZE = 2**28
"""Of any size that is stated; more is no model, and would overflow where sizes are multiplied."""

MAX_LAYERS = 100_000

SIZES = ("vocab_size", "max_position_embeddings", "hidden_size", "num_heads", "window_size", "num_labels")
RATES = ("resid_dropout", "embed_dropout", "attention_dropout", "classifier_dropout")


def check_values(values: Mapping[str, Any]) -> None:
    """Raise ConfigError, with the key, its value and what would be legal, for the first value that is not."""
    for key, most in (*((key, MAX_SIZE) for key in SIZES), ("num_layers", MAX_LAYERS)):
        require(is_count(values[key], most), key, values[key], f"an integer of 1 to {most:,}")
    inner = values["intermediate_size"]
    require(inner is None or is_count(inner, MAX_SIZE), "intermediate_size", inner, "null or an integer of at least 1")
    for key in RATES:
        require(_is_number(values[key]) and 0 <= values[key] <= 1, key, values[key], "a number of 0 to 1")
    for key in ("layer_norm_epsilon", "initializer_range"):
        require(_is_number(values[key]) and values[key] >= 0, key, values[key], "a finite number of at least 0")
    for key in ("use_cache", "tie_word_embeddings"):
        require(isinstance(values[key], bool), key, values[key], "true or false")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        require(_is_token(values[key], several=key == "eos_token_id"), key, values[key], "null or a token's number")
    for key in ("problem_type", "dtype"):
        require(values[key] is None or isinstance(values[key], str), key, values[key], "null or a string")


def check_extra(extra: Mapping[str, Any]) -> None:
    """The same for keys that say nothing about the network, and are read all the same."""
    kinds = extra.get("architectures")
    legal = kinds is None or (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds))
    require(legal, "architectures", kinds, "null or a list of names of classes")
    for key in ("id2label", "label2id"):
        require(isinstance(extra.get(key), dict | None), key, extra.get(key), "null or an object")


def require(legal: bool, key: str, value: object, what: str) -> None:
    """Raise ConfigError unless `legal`; `what` says what would be."""
    if not legal:
        raise ConfigError(f"{key} is {value!r:.100}; legal is {what}")


def is_count(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_token(value: object, several: bool) -> bool:
    if several and isinstance(value, list):
        return all(_is_token(each, False) and each is not None for each in value)
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31)
