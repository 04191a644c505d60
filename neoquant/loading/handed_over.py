"""Generating in the ways that only transformers has, by transformers, with the model's own tensors."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from neoquant.errors import RequestError
from neoquant.generation.config import GenerationConfig
from neoquant.generation.generate import as_ids
from neoquant.loading.methods import ModelMethods, transformers_room
from neoquant.model.cache import KVCache

_OURS = ("seed", "cache_dtype")


def generate_there(
    model: ModelMethods,
    refusal: RequestError,
    input_ids: Any,
    generation_config: Any,
    beside: Mapping[str, Any],
    asked: Mapping[str, Any],
) -> Any:
    """What `model.generate` returns in transformers: ids, or an output of transformers'.

    Args:
        model: a language model; its tensors are shared, not copied.
        refusal: why it is not done here, which is raised where it cannot be done there either.
        input_ids: the prompts, as `generate` takes them; None begins with the beginning of a text.
        generation_config: ours or transformers'.
        beside: the other arguments of `generate`; None is not given.
        asked: settings by name.

    Raises RequestError where transformers is not installed, or for what it does not know: `seed`, `cache_dtype`, a
    cache of neoquant's.
    """
    own = model.generation_config.to_dict() if isinstance(model.generation_config, GenerationConfig) else {}
    if isinstance(generation_config, GenerationConfig):
        own |= generation_config.to_dict()
    for name in _OURS:
        if (asked[name] if name in asked else own.get(name)) is not None:
            raise RequestError(f"{refusal}; {name}, which only neoquant knows, does not go with it")
    if isinstance(beside.get("past_key_values"), KVCache):
        raise RequestError(f"{refusal}; past_key_values of neoquant's do not go with it")
    try:
        theirs = transformers_room().kept(model)
    except RequestError as error:
        raise RequestError(f"{refusal}; {error}") from None
    options = {name: _theirs(value) for name, value in beside.items() if value is not None}
    if isinstance(generation_config, GenerationConfig):
        options["generation_config"] = import_module("transformers").GenerationConfig(**generation_config.to_dict())
    elif generation_config is not None:
        options["generation_config"] = generation_config
    ids = None if input_ids is None else as_ids(input_ids).to(model.device)
    return theirs.generate(ids, **{**options, **asked})


def _theirs(value: Any) -> Any:
    """A model of neoquant's (that guesses) as transformers'."""
    return transformers_room().kept(value) if isinstance(value, ModelMethods) else value
