"""How `generate` and `chat` choose tokens: as the options say, else as the model's folder does, else by defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from neoquant.cli.terminal import Terminal
from neoquant.errors import RequestError, locate

if TYPE_CHECKING:
    from neoquant.generation.config import GenerationConfig
    from neoquant.model.config import GPTNeoConfig

DEFAULTS: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 0.95}

_SEARCHES = ("num_beams", "num_beam_groups", "diversity_penalty", "penalty_alpha", "dola_layers")
"""Other ways to choose tokens, instead of which an option may ask for ours."""


def require_cache(storage: str | None) -> None:
    """Raise RequestError where `--cache` names a type that nothing is held in."""
    from neoquant.model.cache import require_storage

    with locate("--cache"):
        require_storage(storage)


def cache_memory(config: GPTNeoConfig, context: int | None, batch: int) -> str:
    """What keys and values take while so many sequences are generated; `context` None is the whole context.

    Raises RequestError where the model has no such context.
    """
    from neoquant.model.cache import cache_bytes
    from neoquant.model.stored_states import STORAGES
    from neoquant.sizes import plural, size

    limit = config.max_position_embeddings
    positions = limit if context is None else context
    if not 1 <= positions <= limit:
        raise RequestError(f"--context is {positions}; legal is 1 to {limit}, this model's context")
    held = ", ".join(f"{size(cache_bytes(config, positions, batch, each))} {each}" for each in STORAGES)
    return f"{held} for {plural(batch, 'sequence')} of {plural(positions, 'token')}"


def settings(
    own: GenerationConfig,
    terminal: Terminal,
    *,
    greedy: bool = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    cache: str | None = None,
    static_cache: bool = False,
) -> GenerationConfig:
    """What holds, given the folder's `own` settings and the options that were typed; `temperature=0` is greedy.

    Raises RequestError for settings of the folder's that neoquant does not do.
    """
    from neoquant.generation.config import GenerationConfig

    greedy = greedy or temperature == 0
    options = {"temperature": temperature or None, "top_k": top_k, "top_p": top_p}
    asked: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if greedy or asked:
        own = own.unset(_SEARCHES)
        asked["do_sample"] = not greedy
    if repetition_penalty is not None:
        asked["repetition_penalty"] = repetition_penalty
    if cache is not None:
        asked["cache_dtype"] = cache
    if static_cache:
        asked["cache_implementation"] = "static"
    with locate("the model's generation settings"):
        try:
            own.require_possible()
        except RequestError as error:
            if own.others.keys() & set(_SEARCHES):
                error.message += "; --greedy or --temperature generates without"
            raise
    if own.num_return_sequences not in (None, 1):
        terminal.note(f"the model's generation settings ask for {own.num_return_sequences} continuations: one is shown")
        own = own.unset(["num_return_sequences"])
    return GenerationConfig.of(DEFAULTS).but(own).but(GenerationConfig.of(asked))
