"""Continuing a text: one token after another from the model's own predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from neoquant.errors import CheckpointError, ContextError, NeoquantError, RequestError
from neoquant.generation.cuda_graph import Choose, GraphedSteps, refuse
from neoquant.generation.padding import left_padded
from neoquant.generation.passes import Passes
from neoquant.model.cache import KVCache
from neoquant.model.gpt_neo import CausalLM
from neoquant.native import active, products
from neoquant.sizes import plural

Stop = Callable[[Tensor, Tensor | None], Tensor]
"""From all ids so far `[B, S]`, and which hold tokens (None: all), to whether each row ends here, bool `[B]`; all on
the CPU."""

Processor = Callable[[Tensor, Tensor], Tensor]
"""From all ids so far `[B, S]` and the next token's logits `[B, V]` to other logits, as transformers' processors."""

Recorder = Callable[[Tensor, Tensor], object]
"""Told of each next token's logits `[B, V]`, as the model gives them and as one is chosen by them."""

LOOK_EVERY = 8  # tokens that a GPU generates between two looks at them: each look waits until it has caught up
NOTHING = -1  # in place of an id where none could be chosen


class Streamer(Protocol):
    """Whoever is to be told of ids as they come: transformers' streamers are."""

    def put(self, value: Tensor) -> object: ...
    def end(self) -> object: ...


COLD = 1e-6
"""Below this temperature only differences from the largest logit are divided by it: 0, or far below, or -inf."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    `temperature=0` is greedy. `top_k` keeps the k likeliest (0: all), `top_p` the smallest set of likeliest tokens
    whose probabilities reach p (1: all); both after the temperature. `repetition_penalty` divides the positive
    logits of tokens already there and multiplies the negative ones (Keskar et al., 2019, section 4.1; 1: none).
    `min_p` keeps what has at least that part of the likeliest token's probability, after all these (Nguyen et al.,
    2024; 0: all). No `no_repeat_ngram_size` tokens come twice in that order (0: they may). None of `suppress_tokens`
    comes at all, and none of `bad_words_ids`, each one token or more in that order, becomes complete.
    `seed` makes the draw repeatable; None draws from torch's own generator, which `torch.manual_seed` sets.
    A row that has reached one of `eos_token_ids` is filled up with `pad_token_id`, or with the first of them; none is
    reached within the first `min_new_tokens`. None is for the caller to fill in; while generating it is no token.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    eos_token_ids: tuple[int, ...] | None = None
    pad_token_id: int | None = None
    min_new_tokens: int = 0
    min_p: float = 0.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, legal, what in (
            ("temperature", self.temperature >= 0, "at least 0 (0 is greedy)"),
            ("top_k", self.top_k >= 0, "at least 0 (0 keeps all)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (1 keeps all)"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0 (1 is none)"),
            ("min_new_tokens", self.min_new_tokens >= 0, "at least 0"),
            ("min_p", 0 <= self.min_p <= 1, "0 (keeps all) to 1"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "at least 0 (0 lets everything be repeated)"),
        ):
            if not legal:
                raise RequestError(f"{name} is {getattr(self, name)}; legal is {what}")

    @property
    def looks_back(self) -> bool:
        """Whether what has been said before decides what may come."""
        return bool(self.repetition_penalty != 1 or self.no_repeat_ngram_size or self.bad_words_ids)


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """`logits[B, V]` in float32 after temperature, top-k, top-p and min-p; what falls out is -inf."""
    logits = _over_temperature(logits, sampling.temperature)
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        # A token stays while those before it have not reached p: the first always does.
        surplus = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        logits = logits.masked_fill(surplus.scatter(-1, index, surplus), -torch.inf)
    if sampling.min_p > 0:
        probabilities = logits.softmax(-1)
        least = sampling.min_p * probabilities.max(-1, keepdim=True).values
        logits = logits.masked_fill(probabilities < least, -torch.inf)
    return logits


def _over_temperature(logits: Tensor, temperature: float) -> Tensor:
    """`logits[B, V]` over the temperature, which may be so small that a quotient is beyond float32."""
    if temperature >= COLD:
        return logits / temperature
    below = logits - logits.max(-1, keepdim=True).values
    return below / max(temperature, torch.finfo(torch.float32).tiny)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """`logits[B, V]` with the tokens of `seen[B, S]` made less likely."""
    at = logits.gather(-1, seen)
    return logits.scatter(-1, seen, torch.where(at > 0, at / penalty, at * penalty))


def without_repeats(logits: Tensor, seen: Tensor, size: int) -> Tensor:
    """`logits[B, V]` without the tokens that would complete `size` tokens which stand in `seen[B, S]` in that order."""
    if seen.shape[1] < size:
        return logits
    there = seen.unfold(1, size, 1)  # [B, S - size + 1, size]
    ending = seen[:, seen.shape[1] - size + 1 :]
    again = (there[..., :-1] == ending[:, None]).all(-1) & (there >= 0).all(-1)
    V = logits.shape[-1]
    marked = torch.zeros(len(logits), V + 1, dtype=torch.bool, device=logits.device)
    marked.scatter_(1, there[..., -1].where(again, V), True)
    return logits.masked_fill(marked[:, :V], -torch.inf)


def without_words(logits: Tensor, seen: Tensor, words: Sequence[Sequence[int]]) -> Tensor:
    """`logits[B, V]` without the tokens that would complete one of `words` behind `seen[B, S]`."""
    (B, V), S = logits.shape, seen.shape[1]
    marked = torch.zeros(B, V, dtype=torch.bool, device=logits.device)
    for *before, last in words:
        if len(before) <= S and 0 <= last < V:
            # token by token: a tensor of them would be copied to a GPU, which waits for it
            there = [seen[:, place] == token for place, token in enumerate(before, S - len(before))]
            marked[:, last] |= torch.stack(there).all(0) if there else True
    return logits.masked_fill(marked, -torch.inf)


class NextToken(NamedTuple):
    """The next `token` `[B]`; whether there was one to choose, bool `[B]`: not where a logit is NaN or the largest
    infinite; and the logits `[B, V]` by which it was chosen."""

    token: Tensor
    finite: Tensor
    scores: Tensor


def choose(
    logits: Tensor,
    seen: Tensor,
    sampling: Sampling,
    generator: torch.Generator | None,
    processor: Processor | None = None,
) -> NextToken:
    """The next token from the last position's `logits[B, V]` and all ids so far, `seen[B, S]` (NOTHING on padding)."""
    logits, likeliest, finite = _penalized(logits, seen, sampling, processor)
    if sampling.temperature == 0:
        return NextToken(likeliest, finite, logits)
    kept = _kept(logits, finite, sampling)
    return NextToken(draw(kept.softmax(-1), generator), finite, kept)


def draw(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """One of each row of `probabilities[B, V]`, `[B]`: the same as torch.multinomial, whose checks wait for a GPU in
    versions of torch that are still in use, so that no CUDA graph may hold it."""
    noise = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / noise).argmax(-1)


def distribution(logits: Tensor, seen: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The probabilities `[B, V]` with which `choose` draws, where it does (a temperature above 0), and whether there
    was a token to choose, bool `[B]`."""
    logits, _, finite = _penalized(logits, seen, sampling)
    return _kept(logits, finite, sampling).softmax(-1), finite


def _penalized(
    logits: Tensor, seen: Tensor, sampling: Sampling, processor: Processor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[B, V]` in float32, the likeliest `[B]`, and whether they are finite, bool `[B]`. (The largest is NaN
    where any is, so that nothing is read a second time.)"""
    logits = logits.float()
    if sampling.repetition_penalty != 1:
        logits = penalize(logits, _tokens(seen), sampling.repetition_penalty)
    if sampling.no_repeat_ngram_size:
        logits = without_repeats(logits, seen, sampling.no_repeat_ngram_size)
    if sampling.bad_words_ids or sampling.suppress_tokens:
        words = [*sampling.bad_words_ids, *([token] for token in sampling.suppress_tokens)]
        logits = without_words(logits, seen, words)
    if processor is not None:
        logits = processor(_tokens(seen), logits)
    return logits, *_likeliest(logits)


def _likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of `logits[B, V]` in float32 the likeliest tokens, `[B]`, and whether they and all others are numbers."""
    if type(logits) is Tensor and logits.is_cpu and logits.is_contiguous() and active().library is not None:
        return products.likeliest(logits)
    largest, likeliest = logits.max(-1)
    return likeliest, largest.isfinite()


def _tokens(seen: Tensor) -> Tensor:
    """`seen[B, S]` with tokens only: on padding, the last one once more."""
    return torch.where(seen < 0, seen[:, -1:], seen)


def _kept(logits: Tensor, finite: Tensor, sampling: Sampling) -> Tensor:
    # Drawing from what is not finite ends a process on a GPU: draw anything instead, the caller raises an error.
    return filter_logits(logits.masked_fill(~finite[:, None], 0.0), sampling)


class _Inputs:
    """What the model is given: the prompts, padding moved to the left, then one position after another."""

    def __init__(
        self,
        ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        token_type_ids: Tensor | None,
        new: int,
    ) -> None:
        self.keep: Tensor | None = None
        self.ids = ids
        self._rows, self._all = list(range(len(ids))), len(ids)
        self._index: Tensor | None = None  # of the rows that go on, where not all do
        self._graphed: GraphedSteps | None = None
        self.positions = _like(ids, position_ids, "position_ids")
        self.types = _like(ids, token_type_ids, "token_type_ids")
        if attention_mask is None:
            return
        keep, order = left_padded(ids, attention_mask)
        ids = ids.gather(1, order)
        self.ids = torch.where(keep, ids, ids[:, -1:])  # a padding id may lie outside the vocabulary
        self.types = None if self.types is None else self.types.gather(1, order)
        counted = (keep.cumsum(1) - 1).clamp_(min=0)
        self.positions = counted if self.positions is None else self.positions.gather(1, order)
        self._order = order
        self.keep = torch.cat([keep, keep.new_ones(len(ids), new)], dim=1)

    def leave_out(self, positions: int) -> None:
        """The first positions are in the cache already. Raises RequestError where padding stands behind tokens."""
        if self.keep is not None and (self._order.diff(dim=1) < 0).any():
            raise RequestError("with past_key_values, padding stands before the tokens (padding_side='left')")
        self.ids = self.ids[:, positions:]
        self.positions = None if self.positions is None else self.positions[:, positions:]
        self.types = None if self.types is None else self.types[:, positions:]

    def logits(self, passes: Passes, cache: KVCache) -> Tensor:
        """Of the token that follows, `[B, V]`."""
        logits = self._computed(passes, cache) if self._graphed is None else self._graphed.logits(self.ids)
        if self._index is not None:  # rows that have ended draw too, or the others would draw something else
            return logits.new_zeros(self._all, logits.shape[-1]).index_copy_(0, self._index, logits)
        return logits

    def _computed(self, passes: Passes, cache: KVCache) -> Tensor:
        """The same of the rows that go on."""
        keep = None if self.keep is None else self.keep[:, : cache.length + self.ids.shape[1]]
        return passes.logits(self.ids, cache, positions=self.positions, keep=keep, types=self.types)[:, -1]

    def use_graph(
        self, model: CausalLM, cache: KVCache, choose: Choose | None, generator: torch.Generator | None
    ) -> None:
        """From here on a CUDA graph computes the rows that go on, all of them to the end; `cache` is no longer used.
        By `choose` it chooses their tokens too, unless rows have ended, which draw as well."""
        choose = choose if self._index is None else None
        drawn = None if choose is None else generator
        self._graphed = GraphedSteps(model, cache, self.keep, self.positions, self.types, choose, drawn)

    def chosen(self) -> Tensor | None:
        """The token that follows, `[B]`, NOTHING where none could be chosen; None where no graph chooses it."""
        if self._graphed is None or self._graphed.choose is None:
            return None
        return self._graphed.chosen(self.ids)

    def leave(self, rows: list[int], cache: KVCache) -> None:
        """Only these rows go on, of those that did."""
        if len(rows) == len(self._rows) or self._graphed is not None:
            return
        kept = torch.tensor([self._rows.index(row) for row in rows], device=self.ids.device)
        self._rows, self._index = rows, torch.tensor(rows, device=self.ids.device)
        cache.select(kept)
        self.keep, self.positions, self.types = (
            None if tensor is None else tensor.index_select(0, kept)
            for tensor in (self.keep, self.positions, self.types)
        )

    def follow(self, ids: Tensor) -> None:
        """`ids[B]` are given next, of the rows that go on. Their type is the one of the position before."""
        self.ids = (ids if self._index is None else ids.index_select(0, self._index))[:, None]
        if self._graphed is not None:
            return
        self.positions = None if self.positions is None else self.positions[:, -1:] + 1
        self.types = None if self.types is None else self.types[:, -1:]


class Endings:
    """Which rows have ended, kept on the CPU."""

    def __init__(self, ids: Tensor, keep: Tensor | None, sampling: Sampling, stop: Stop | None, new: int) -> None:
        """`ids[B, T]` are the prompts; `keep[B, T + new]` is False on padding."""
        self._ends = frozenset(sampling.eos_token_ids or ())
        first = next(iter(sampling.eos_token_ids or ()), 0)
        self._filler = sampling.pad_token_id if sampling.pad_token_id is not None else first
        self._ended = [False] * len(ids)  # few numbers: lists are faster than tensors
        self._stop = stop
        self._length = ids.shape[1]
        if stop is not None:
            self._seen = torch.cat([ids.cpu(), torch.empty(len(ids), new, dtype=ids.dtype)], dim=1)
            self._keep = None if keep is None else keep.cpu()

    def take(self, drawn: Tensor) -> tuple[Tensor, bool, bool]:
        """From what was drawn next, `[B]`: what is given out, whether all rows that go on had something to draw, and
        whether all have ended."""
        ids = drawn.tolist()
        usable = all(ended or token != NOTHING for token, ended in zip(ids, self._ended, strict=True))
        if self._ends:
            if any(self._ended):
                ids = [self._filler if ended else token for token, ended in zip(ids, self._ended, strict=True)]
                drawn = torch.tensor(ids, dtype=drawn.dtype)
            self._ended = [ended or token in self._ends for token, ended in zip(ids, self._ended, strict=True)]
        if self._stop is not None:
            self._seen[:, self._length] = drawn
            self._length += 1
            keep = None if self._keep is None else self._keep[:, : self._length]
            stopped = self._stop(self._seen[:, : self._length], keep).tolist()
            self._ended = [ended or now for ended, now in zip(self._ended, stopped, strict=True)]
        return drawn, usable, all(self._ended)

    def going_on(self) -> list[int]:
        """The rows whose next tokens matter: without an end-of-text token nothing fills up those that have ended."""
        return [row for row, ended in enumerate(self._ended) if not (ended and self._ends)]


@torch.inference_mode()
def stream(
    model: CausalLM,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Stop | None = None,
    look_every: int | None = None,
    cache_dtype: str | None = None,
    processor: Processor | None = None,
    record: Recorder | None = None,
    static_cache: bool = False,
    cache: KVCache | None = None,
    steady: bool = False,
) -> Iterator[Tensor]:
    """Yield the next ids `[B]` of `input_ids[B, T]`, on the CPU, one position at a time, until all rows have ended.

    Rows of different lengths are padded, on either side, and `attention_mask[B, T]` is 0 there: each is continued as it
    would be alone. A row ends behind an end-of-text token, or where `stop` says so; where there are end-of-text tokens,
    it is filled up from there, and the model computes the others alone. New positions count on from
    `position_ids[B, T]`, and have the type of the last of `token_type_ids[B, T]`. Ids come from the model's device
    `look_every` at a time (None: 1 on a CPU, LOOK_EVERY elsewhere), and nothing else waits for it; what it has made
    beyond the end is dropped.
    Keys and values are held in `cache_dtype`: "float32", "float16", "int8", or as they come. With `static_cache`, in
    buffers of fixed size, so that a GPU replays each token's work as one CUDA graph (on a CPU it changes nothing); rows
    that have ended are then computed to the end. `processor` may change the logits before a token is chosen by them;
    `record` is told of them, which are 0 in rows that have ended.
    `cache` holds the keys and values of the first positions of `input_ids`, perhaps none, and in the end those of all
    but the last one yielded; every row is then computed to the end, and `static_cache` and `cache_dtype` go without.
    `steady` says that nobody changes the model before the end: what a token's work rests on is then looked at once.

    Raises ContextError before anything is generated where prompt and new tokens do not fit into the model's context,
    CheckpointError where the model's predictions are not finite, RequestError for a model whose work cannot be replayed
    with `static_cache`.
    """
    sampling = sampling or Sampling()
    B, T = input_ids.shape
    check_room(model, T, max_new_tokens)
    static_cache = static_cache and model.device.type != "cpu" and cache is None
    if static_cache and (reason := refuse(model, cache_dtype)):
        raise RequestError(f"a static cache needs a model whose work can be recorded on one GPU: {reason}")
    device = model.device
    every = look_every or (1 if device.type == "cpu" else LOOK_EVERY)
    generator = None if sampling.seed is None else torch.Generator(device=device).manual_seed(sampling.seed)
    mask, positions, types = (
        None if tensor is None else tensor.to(device) for tensor in (attention_mask, position_ids, token_type_ids)
    )
    inputs = _Inputs(input_ids.to(device), mask, positions, types, max_new_tokens)
    endings = Endings(inputs.ids, inputs.keep, sampling, stop, max_new_tokens)
    known = inputs.ids if inputs.keep is None else inputs.ids.where(inputs.keep[:, :T], NOTHING)
    seen = torch.cat([known, known.new_empty(B, max_new_tokens)], dim=1)
    matters = sampling.looks_back or processor is not None  # to what comes, what has been said
    waiting: list[Tensor] = []  # to be looked at
    eos = [e for e in sampling.eos_token_ids or () if 0 <= e < model.config.vocab_size]
    reachable = torch.tensor(eos, dtype=seen.dtype, device=device)
    given = cache
    if given is None:
        cache = KVCache.of(model.config, max(1, T if static_cache else T + max_new_tokens), cache_dtype)
    else:
        cache = require_beginning(given, inputs.ids)
        inputs.leave_out(cache.length)
    passes, looked = Passes(model, steady), 0
    for new in range(max_new_tokens):
        if static_cache and new == 1:
            alone = processor is None and record is None
            inputs.use_graph(model, cache, _by_logits(sampling, generator) if alone else None, generator)
        if (chosen := inputs.chosen()) is not None:
            waiting.append(chosen.clone())  # the next one overwrites it
        else:
            raw = inputs.logits(passes, cache)
            logits = raw if new >= sampling.min_new_tokens else raw.index_fill(-1, reachable, -torch.inf)
            drawn, finite, scores = choose(logits, seen[:, : T + new], sampling, generator, processor)
            if record is not None:
                record(raw, scores)
            if matters:
                seen[:, T + new] = drawn
            waiting.append(drawn.where(finite, NOTHING))
        if len(waiting) == every or new + 1 == max_new_tokens:
            together, waiting = waiting if device.type == "cpu" else torch.stack(waiting).cpu().unbind(), []
            for ids in together:
                looked += 1
                row, is_usable, is_last = endings.take(ids.to(seen.dtype))
                if not is_usable:
                    raise no_choice(model, looked, sampling, None if chosen is not None else raw)
                yield row
                if is_last:
                    if given is not None:
                        cache.crop(T + looked - 1)  # a GPU may have gone on
                    return
            if given is None:
                inputs.leave(endings.going_on(), cache)
        if chosen is None:
            inputs.follow(drawn)


def _by_logits(sampling: Sampling, generator: torch.Generator | None) -> Choose | None:
    """`choose` for a token behind the first, by its logits `[B, V]` alone: `[B]`, NOTHING where there is none; None
    where more than the logits decides, or numbers come from torch's own generator, from which others draw as well."""
    by_more = sampling.looks_back or sampling.suppress_tokens or sampling.min_new_tokens > 1
    if by_more or (sampling.temperature > 0 and generator is None):
        return None

    def chosen(logits: Tensor) -> Tensor:
        drawn, finite, _ = choose(logits, Tensor(), sampling, generator)
        return drawn.where(finite, NOTHING)

    return chosen


def require_beginning(cache: KVCache, ids: Tensor) -> KVCache:
    """Raise RequestError unless a cache holds the beginnings of `ids[B, T]`, less than all of them."""
    if not isinstance(cache, KVCache):
        raise RequestError(
            f"past_key_values is of type {type(cache).__name__}; generate takes the KVCache that it, or a model, gave "
            "before (in Python, model.to_transformers().generate takes transformers' own)"
        )
    if cache.length >= ids.shape[1]:
        raise RequestError(
            f"past_key_values holds {plural(cache.length, 'position')}, input_ids has {ids.shape[1]}: give all ids, "
            "those that the cache holds included, and at least one more"
        )
    if cache.length and (rows := cache.states(0)[0].shape[0]) != len(ids):
        raise RequestError(f"past_key_values is of {plural(rows, 'row')}, input_ids has {len(ids)}")
    return cache


def no_choice(model: CausalLM, number: int, sampling: Sampling, raw: Tensor | None) -> NeoquantError:
    """Why no token could be chosen: what was asked for rules all out, or the model's logits `raw` `[B, V]`, or those
    that nobody has kept, are not finite."""
    ruling_out = [
        f"{name}={value}" if isinstance(value, int) else f"{name} ({len(value)} of them)"
        for name in ("no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "min_new_tokens")
        if (value := getattr(sampling, name))
    ]
    if ruling_out and raw is not None and bool(raw.amax(-1).isfinite().all()):
        return RequestError(
            f"new token {number} cannot be chosen: {' and '.join(ruling_out)} rule out all {raw.shape[-1]:,} tokens"
        )
    dtype = str(model.dtype).removeprefix("torch.")
    advice = "the weights may be damaged"
    if model.dtype == torch.float16:
        advice = "float16 ends at 65504, which GPT-Neo's activations may pass: load it with dtype bfloat16 or float32"
    return CheckpointError(
        f"new token {number} cannot be chosen: the model's predictions, computed in {dtype}, are not finite (NaN or "
        f"infinite); {advice}"
    )


def _like(ids: Tensor, given: Tensor | None, name: str) -> Tensor | None:
    """`given`, `[B, T]` or `[1, T]`, in the shape of `ids[B, T]`."""
    if given is None or given.shape == ids.shape:
        return given
    if given.shape != (1, ids.shape[1]):
        raise RequestError(f"{name} is {list(given.shape)}, but input_ids is {list(ids.shape)}")
    return given.expand(ids.shape)


def require_known_tokens(model: CausalLM, ids: Sequence[int]) -> None:
    """Raise RequestError where a tokenizer gave a token that the model has no row for."""
    if (largest := max(ids, default=0)) >= model.config.vocab_size:
        raise RequestError(
            f"the tokenizer gives token {largest}, but the model knows {model.config.vocab_size} tokens: "
            "is it the model's own tokenizer?"
        )


def check_room(model: CausalLM, prompt: int, max_new_tokens: int) -> None:
    """Raise ContextError unless a prompt of that many tokens leaves room for the new ones."""
    limit = model.config.max_position_embeddings
    if prompt < 1:
        raise RequestError("the prompt is empty: it needs at least one token, for example the end-of-text token")
    if max_new_tokens < 0:
        raise RequestError(f"max_new_tokens is {max_new_tokens}; legal is at least 0")
    if prompt > limit:
        raise ContextError(f"the prompt has {plural(prompt, 'token')}; this model's context is {limit}")
    if prompt + max_new_tokens > limit:
        raise ContextError(
            f"{plural(prompt, 'token')} of prompt and {max_new_tokens:,} new make {prompt + max_new_tokens:,}; "
            f"this model's context is {limit}: ask for at most {plural(limit - prompt, 'new token')}"
        )


def generate(
    model: CausalLM,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    stop: Stop | None = None,
    cache_dtype: str | None = None,
    processor: Processor | None = None,
    record: Recorder | None = None,
    static_cache: bool = False,
    cache: KVCache | None = None,
    streamer: Streamer | None = None,
) -> Tensor:
    """`input_ids[B, T]` with up to `max_new_tokens` more: `[B, T + new]`; the other arguments are `stream`'s.

    `streamer` is told of the prompt, of each new id, and of the end.
    """
    watched = streamer is not None or stop is not None or (sampling is not None and sampling.eos_token_ids)
    called = (streamer, stop, processor, record)  # others' functions, which may do anything
    made = stream(
        model,
        input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        token_type_ids=token_type_ids,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        look_every=None if watched else max_new_tokens,
        cache_dtype=cache_dtype,
        processor=processor,
        record=record,
        static_cache=static_cache,
        cache=cache,
        steady=all(each is None for each in called),
    )
    return collect(input_ids.to(model.device), made, streamer)


def collect(input_ids: Tensor, made: Iterable[Tensor], streamer: Streamer | None) -> Tensor:
    """`input_ids[B, T]` and what is `made` after it, `[B]` at a time, of which `streamer` is told: `[B, T + new]`."""
    if streamer is not None:
        streamer.put(input_ids.cpu())
    chosen = []
    for ids in made:
        chosen.append(ids)
        if streamer is not None:
            streamer.put(ids)
    if streamer is not None:
        streamer.end()
    if not chosen:
        return input_ids
    return torch.cat([input_ids, torch.stack(chosen, dim=1).to(input_ids.device)], dim=1)


def in_turn(processors: Sequence[Processor] | None) -> Processor | None:
    """All of them as one; None for none."""
    if not processors:
        return None

    def process(ids: Tensor, logits: Tensor) -> Tensor:
        for processor in processors:
            logits = processor(ids, logits)
        return logits

    return process


def as_ids(values: Tensor | Sequence[Sequence[int]] | Sequence[int]) -> Tensor:
    """Token ids in any usual form as `[B, T]`. Raises RequestError for what are none."""
    if isinstance(values, Mapping):
        raise RequestError("input_ids are what a tokenizer gives, which is unpacked: generate(**inputs)")
    try:
        ids = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # a text, rows of several lengths, ...
        raise RequestError(
            f"input_ids are {values!r:.60}: {error}; legal are a tensor [B, T] of token ids, or lists of equal "
            "lengths, as a tokenizer makes them"
        ) from None
    if ids.ndim not in (1, 2) or (ids.numel() and ids.dtype not in (torch.int64, torch.int32)):
        raise RequestError(f"input_ids are {ids.dtype} {list(ids.shape)}; legal are token ids int64 or int32 [B, T]")
    return ids[None] if ids.ndim == 1 else ids


def require_in_vocabulary(model: CausalLM, ids: Tensor, attention_mask: Tensor | None) -> None:
    """Raise RequestError where `ids[B, T]` that are no padding are none of the model's tokens; on a GPU nobody looks,
    which would wait for it."""
    if ids.device.type != "cpu" or (attention_mask is not None and attention_mask.device.type != "cpu"):
        return
    outside = (ids < 0) | (ids >= model.config.vocab_size)
    if attention_mask is not None and attention_mask.shape == ids.shape:
        outside &= attention_mask.bool()
    if bool(outside.any()):
        first = int(ids[outside][0])
        raise RequestError(f"input_ids hold {first}; the model's tokens are 0 to {model.config.vocab_size - 1:,}")
