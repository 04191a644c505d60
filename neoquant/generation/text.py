"""Text from a model: a whole continuation, or piece by piece as it is generated."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from neoquant.errors import RequestError
from neoquant.generation.config import GenerationConfig
from neoquant.generation.generate import Sampling, stream
from neoquant.generation.stopping import ends_with
from neoquant.model.gpt_neo import CausalLM
from neoquant.tokenizer.tokenizer import Tokenizer

DEFAULT_NEW_TOKENS = 64


def generate_text(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
    on_text: Callable[[str], object] | None = None,
) -> str:
    """The continuation of `prompt`, without the prompt and the end-of-text token.

    Args:
        model: what it was loaded with in generation_config.json holds: end of text, stop strings, sampling, lengths.
        tokenizer: the model's.
        prompt: an empty one is an end-of-text token.
        max_new_tokens: None is the model's own, or else 64, or what the context leaves.
        sampling: instead of the model's own; its `eos_token_ids=None` are still the model's.
        on_text: called with each piece of text as soon as it is certain.

    Raises ContextError where prompt and new tokens do not fit, RequestError for an illegal value, CheckpointError for
    predictions that are not finite.
    """
    ids = tokenizer.prompt_ids(prompt)
    settings = GenerationConfig.of_model(model)
    own = settings.sampling(len(ids))
    sampling = own if sampling is None else sampling
    if sampling.eos_token_ids is None:
        sampling = replace(sampling, eos_token_ids=own.eos_token_ids)
    if max_new_tokens is None:
        context = model.config.max_position_embeddings
        max_new_tokens = settings.new_tokens(len(ids), context, default=DEFAULT_NEW_TOKENS)
    pieces: list[str] = []

    def write(text: str) -> None:
        pieces.append(text)
        if on_text is not None:
            on_text(text)

    made = stream(
        model,
        torch.tensor([ids]),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=ends_with(settings.stops(), tokenizer),
        cache_dtype=settings.cache_dtype,
        static_cache=settings.static_cache,
    )
    write_text(made, tokenizer, write, sampling.eos_token_ids or ())
    return "".join(pieces)


def write_text(
    made: Iterable[Tensor], tokenizer: Tokenizer, write: Callable[[str], object], ends: Collection[int]
) -> int:
    """Hand the text of what `stream` makes of one prompt to `write`, piece by piece; how many tokens it was.

    Tokens of `ends`, which end a text, count and are not written. What is held back is written whatever ends it.
    """
    out, tokens = TextStream(tokenizer, write), 0
    try:
        for chosen in made:
            tokens += 1
            if (token := int(chosen[0])) not in ends:
                out.put(token)
    finally:
        out.end()
    return tokens


class TextStream:
    """Turns ids, one at a time, into text as soon as it is certain.

    A character may be spread over several tokens: what ends in the middle of one is held back until it is whole.
    """

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], object]) -> None:
        self._tokenizer = tokenizer
        self._write = write
        self._held: list[int] = []

    def put(self, token: int) -> None:
        """Take the next id."""
        self._held.append(token)
        text = self._tokenizer.decode(self._held)
        if text and not text.endswith("�"):
            self._flush(text)

    def end(self) -> None:
        """Write what is held back, whole or not."""
        if self._held:
            self._flush(self._tokenizer.decode(self._held))

    def _flush(self, text: str) -> None:
        self._write(text)
        self._held.clear()


class TextStreamer:
    """Prints a text while `generate(streamer=...)` makes it: prompt and all, or without the prompt."""

    def __init__(self, tokenizer: Tokenizer, skip_prompt: bool = False, *, skip_special_tokens: bool = False) -> None:
        self._skip_prompt, self._skip_special = skip_prompt, skip_special_tokens
        self._special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._text = TextStream(tokenizer, lambda text: print(text, end="", flush=True))
        self._prompt_comes = True

    def put(self, value: Tensor) -> None:
        """Take the prompt `[1, T]`, then each new id `[1]`. Raises RequestError for more than one row."""
        if value.ndim > 1 and value.shape[0] > 1:
            raise RequestError(f"a TextStreamer shows one text, not {value.shape[0]} at once")
        skipped = self._prompt_comes and self._skip_prompt
        self._prompt_comes = False
        for token in [] if skipped else value.flatten().tolist():
            if not (self._skip_special and token in self._special):
                self._text.put(token)

    def end(self) -> None:
        """Print what is held back, and a line end."""
        self._text.end()
        print(flush=True)
        self._prompt_comes = True
