"""`neoquant generate` without `--task`: a text and its continuation, as it is made."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neoquant import demo
from neoquant.cli.generation import settings
from neoquant.cli.models import Loading
from neoquant.cli.terminal import Terminal
from neoquant.sizes import plural

if TYPE_CHECKING:
    from torch import Tensor

    from neoquant.generation.config import GenerationConfig
    from neoquant.generation.drafting import Drafter
    from neoquant.generation.generate import Sampling
    from neoquant.loading.pretrained import GPTNeoForCausalLM
    from neoquant.tokenizer.tokenizer import Tokenizer

DEFAULT_TOKENS = 100
LOOKUP = "lookup"
"""What `--draft` takes in place of a model: what followed where the text ended likewise before."""


@dataclass(frozen=True)
class Choices:
    """The options that choose tokens; None where the model's own settings hold."""

    greedy: bool
    temperature: float | None
    top_k: int | None
    top_p: float | None
    repetition_penalty: float | None
    seed: int | None
    max_new_tokens: int | None
    cache: str | None
    static_cache: bool
    draft: str | None


def continue_text(
    source: str | Path, text: str, choices: Choices, loading: Loading, activations: str, terminal: Terminal
) -> None:
    """Print `text` and what the model continues it with; how many tokens a second is a note.

    Raises RequestError where the text leaves no room in the context.
    """
    import torch

    from neoquant.generation.generate import check_room, require_known_tokens, stream
    from neoquant.generation.speculative import Acceptance, stream_with_drafts
    from neoquant.generation.stopping import ends_with
    from neoquant.loading.pretrained import load

    network, tokenizer = load(source, **loading._asdict(), activations=activations, progress=terminal.progress)
    own = settings(
        network.generation_config,
        terminal,
        greedy=choices.greedy,
        temperature=choices.temperature,
        top_k=choices.top_k,
        top_p=choices.top_p,
        repetition_penalty=choices.repetition_penalty,
        cache=choices.cache,
        static_cache=choices.static_cache,
    )
    ids = tokenizer.prompt_ids(text)
    seed = random.SystemRandom().randrange(2**31) if choices.seed is None else choices.seed
    sampling = replace(own.sampling(len(ids)), seed=seed)
    length = choices.max_new_tokens
    if length is None:
        length = own.new_tokens(len(ids), network.config.max_position_embeddings, default=DEFAULT_TOKENS)
    require_known_tokens(network, ids)
    check_room(network, len(ids), length)  # before the prompt is printed

    acceptance = Acceptance()
    options: dict[str, Any] = {"max_new_tokens": length, "sampling": sampling, "cache_dtype": own.cache_dtype}
    options |= {"stop": ends_with(own.stops(), tokenizer), "static_cache": own.static_cache}
    prompt = torch.tensor([ids])
    if choices.draft is None:
        made = stream(network, prompt, steady=True, **options)
    else:
        drafter = _drafter(choices.draft, network, sampling, loading, terminal)
        made = stream_with_drafts(network, prompt, drafter, acceptance=acceptance, steady=True, **options)
    started = time.perf_counter()
    terminal.show_raw(text)
    tokens = _print_continuation(made, tokenizer, own, terminal)
    seconds = time.perf_counter() - started
    repeat = "" if sampling.temperature == 0 else f"; to repeat: --seed {seed}"
    if acceptance.drafted:
        terminal.note(f"drafts: {acceptance}")
    terminal.note(f"{plural(tokens, 'token')} in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s{repeat}")


def _drafter(
    draft: str, network: GPTNeoForCausalLM, sampling: Sampling, loading: Loading, terminal: Terminal
) -> Drafter:
    """What `--draft` names: LOOKUP, or a model, loaded as the other one."""
    from neoquant.generation.drafting import ModelDrafter, PromptLookup, require_same_vocabulary
    from neoquant.loading.load import load_model
    from neoquant.loading.pretrained import GPTNeoForCausalLM

    if draft == LOOKUP:
        return PromptLookup()
    how = loading._asdict() | {"revision": None}
    model = load_model(demo.resolve(draft), GPTNeoForCausalLM, **how, progress=terminal.progress)
    require_same_vocabulary(network, model)
    return ModelDrafter(model, sampling)


def _print_continuation(made: Iterable[Tensor], tokenizer: Tokenizer, own: GenerationConfig, terminal: Terminal) -> int:
    """Print the tokens that are made, and count them."""
    from neoquant.generation.text import write_text

    try:
        return write_text(made, tokenizer, terminal.show_raw, own.ends())
    finally:
        terminal.show_raw("\n")
