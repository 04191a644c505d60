"""Continuing a text: one token after another from the model's own predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from neoquant.errors import ContextError, RequestError
from neoquant.model.cache import KVCache
from neoquant.model.gpt_neo import CausalLM
from neoquant.tokenizer.tokenizer import Tokenizer

Stop = Callable[[Tensor], Tensor]
"""From each row's new ids `[B, new]` to whether it ends behind them, bool `[B]`."""


class Streamer(Protocol):
    """Whoever is to be told of ids as they come: transformers' streamers are."""

    def put(self, value: Tensor) -> object: ...
    def end(self) -> object: ...


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    `temperature=0` is greedy. `top_k` keeps the k likeliest (0: all), `top_p` the smallest set of likeliest tokens
    whose probabilities reach p (1: all); both after the temperature. `repetition_penalty` divides the positive
    logits of tokens already there and multiplies the negative ones (Keskar et al., 2019, section 4.1; 1: none).
    `seed` makes the draw repeatable; None draws from torch's own generator, which `torch.manual_seed` sets.
    A row that has reached one of `eos_token_ids` is filled up with `pad_token_id`, or with the first of them;
    none is reached within the first `min_new_tokens`.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    eos_token_ids: tuple[int, ...] = field(default=())
    pad_token_id: int | None = None
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        for name, legal, what in (
            ("temperature", self.temperature >= 0, "at least 0 (0 is greedy)"),
            ("top_k", self.top_k >= 0, "at least 0 (0 keeps all)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (1 keeps all)"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0 (1 is none)"),
            ("min_new_tokens", self.min_new_tokens >= 0, "at least 0"),
        ):
            if not legal:
                raise RequestError(f"{name} is {getattr(self, name)}; legal is {what}")


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """`logits[B, V]` in float32 after temperature, top-k and top-p; what falls out is -inf."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        # A token stays while those before it have not reached p: the first always does.
        surplus = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        logits = logits.masked_fill(surplus.scatter(-1, index, surplus), -torch.inf)
    return logits


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """`logits[B, V]` with the tokens of `seen[B, S]` made less likely."""
    at = logits.gather(-1, seen)
    return logits.scatter(-1, seen, torch.where(at > 0, at / penalty, at * penalty))


def choose(logits: Tensor, seen: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """The next token `[B]` from the last position's `logits[B, V]` and all ids so far, `seen[B, S]`."""
    logits = logits.float()
    if sampling.repetition_penalty != 1:
        logits = penalize(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = filter_logits(logits, sampling).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


@torch.inference_mode()
def stream(
    model: CausalLM,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Stop | None = None,
) -> Iterator[Tensor]:
    """Yield the next ids `[B]` of `input_ids[B, T]`, one position at a time, until all rows have ended.

    Rows of different lengths are padded, on either side, and `attention_mask[B, T]` is 0 there: each is continued as it
    would be alone. A row ends behind an end-of-text token, or where `stop` says so, and is filled up from there. Raises
    ContextError before anything is generated where prompt and new tokens do not fit into the model's context.
    """
    sampling = sampling or Sampling()
    B, T = input_ids.shape
    check_room(model, T, max_new_tokens)
    device = model.device
    generator = None if sampling.seed is None else torch.Generator(device=device).manual_seed(sampling.seed)
    new, keep = align(input_ids.to(device), None if attention_mask is None else attention_mask.to(device))
    seen = torch.cat([new, new.new_empty(B, max_new_tokens)], dim=1)
    positions = None
    if keep is not None:
        positions = (keep.cumsum(1) - 1).clamp_(min=0)
        seen[:, :T] = torch.where(keep, new, new[:, -1:])  # padding is no token that was there
        keep = torch.cat([keep, keep.new_ones(B, max_new_tokens)], dim=1)
    ends = torch.tensor(sampling.eos_token_ids, dtype=new.dtype, device=device)
    filler = sampling.pad_token_id if sampling.pad_token_id is not None else next(iter(sampling.eos_token_ids), 0)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    cache = KVCache(model.config.num_layers, capacity=max(1, T + max_new_tokens))
    for end in range(T, T + max_new_tokens):
        mask = None if keep is None else keep[:, :end]
        logits = model(new, mask, position_ids=positions, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        if end - T < sampling.min_new_tokens:
            logits = logits.index_fill(-1, ends, -torch.inf)
        chosen = choose(logits, seen[:, :end], sampling, generator)
        if len(ends) or stop is not None:
            chosen = chosen.masked_fill(ended, filler)
            ended |= torch.isin(chosen, ends)
        seen[:, end] = chosen
        if stop is not None:
            ended |= stop(seen[:, T : end + 1]).to(device)
        yield chosen
        if bool(ended.all()):
            return
        new = chosen[:, None]
        if positions is not None:
            positions = positions[:, -1:] + 1


def align(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`input_ids[B, T]` with all padding moved to the left, so that every row ends with its last token.

    And which of the positions hold tokens, bool `[B, T]`, or None where all do. Raises RequestError for a mask of
    another shape, or a row without a token.
    """
    if attention_mask is None:
        return input_ids, None
    if attention_mask.shape != input_ids.shape:
        raise RequestError(f"attention_mask is {list(attention_mask.shape)}, but input_ids is {list(input_ids.shape)}")
    keep = attention_mask.bool()
    if not bool(keep.any(1).all()):
        raise RequestError("attention_mask leaves a row no token: every prompt needs at least one")
    if bool(keep.all()):
        return input_ids, None
    order = keep.int().argsort(dim=1, stable=True)
    return input_ids.gather(1, order), keep.gather(1, order)


def check_room(model: CausalLM, prompt: int, max_new_tokens: int) -> None:
    """Raise ContextError unless a prompt of that many tokens leaves room for the new ones."""
    limit = model.config.max_position_embeddings
    if prompt < 1:
        raise RequestError("the prompt is empty: it needs at least one token, for example the end-of-text token")
    if max_new_tokens < 0:
        raise RequestError(f"max_new_tokens is {max_new_tokens}; legal is at least 0")
    if prompt > limit:
        raise ContextError(f"the prompt has {prompt} tokens; this model's context is {limit}")
    if prompt + max_new_tokens > limit:
        raise ContextError(
            f"{prompt} tokens of prompt and {max_new_tokens} new ones make {prompt + max_new_tokens}; "
            f"this model's context is {limit}: ask for at most {limit - prompt} new tokens"
        )


def generate(
    model: CausalLM,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    stop: Stop | None = None,
    streamer: Streamer | None = None,
) -> Tensor:
    """`input_ids[B, T]` with up to `max_new_tokens` more: `[B, T + new]`; the other arguments are `stream`'s.

    `streamer` is told of the prompt, of each new id, and of the end.
    """
    if streamer is not None:
        streamer.put(input_ids.cpu())
    chosen = []
    for ids in stream(
        model, input_ids, attention_mask=attention_mask, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop
    ):
        chosen.append(ids)
        if streamer is not None:
            streamer.put(ids.cpu())
    if streamer is not None:
        streamer.end()
    if not chosen:
        return input_ids
    return torch.cat([input_ids.to(chosen[0].device), torch.stack(chosen, dim=1)], dim=1)


def ends_with(stops: Sequence[str], tokenizer: Tokenizer | None) -> Stop | None:
    """Whether a row's new text holds one of `stops`. Raises RequestError where there is no tokenizer to read it."""
    if not stops:
        return None
    if tokenizer is None:
        raise RequestError("stop_strings are looked for in text: pass tokenizer=... with them")

    def stop(new: Tensor) -> Tensor:
        texts = tokenizer.batch_decode(new)
        return torch.tensor([any(stop in text for stop in stops) for text in texts])

    return stop


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


def eos_ids(model: CausalLM) -> tuple[int, ...]:
    """The tokens that end a text, as the model's configuration has them."""
    eos = model.config.eos_token_id
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)


def generate_text(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    on_text: Callable[[str], object] | None = None,
) -> str:
    """The continuation of `prompt`, without the prompt and the end-of-text token; `on_text` gets it piece by piece."""
    ids = tokenizer.prompt_ids(prompt)
    sampling = sampling or Sampling(eos_token_ids=eos_ids(model))
    pieces: list[str] = []

    def write(text: str) -> None:
        pieces.append(text)
        if on_text is not None:
            on_text(text)

    out = TextStream(tokenizer, write)
    for chosen in stream(model, torch.tensor([ids]), max_new_tokens=max_new_tokens, sampling=sampling):
        token = int(chosen[0])
        if token in sampling.eos_token_ids:
            break
        out.put(token)
    out.end()
    return "".join(pieces)


def as_ids(values: Tensor | Sequence[Sequence[int]] | Sequence[int]) -> Tensor:
    """Token ids in any usual form as `[B, T]`."""
    ids = torch.as_tensor(values)
    return ids[None] if ids.ndim == 1 else ids
