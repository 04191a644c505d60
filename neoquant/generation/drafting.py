"""What guesses the next tokens for a model to check: a smaller model, or a text that repeats itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from neoquant.errors import RequestError
from neoquant.generation.generate import Sampling, choose, distribution
from neoquant.generation.passes import Passes
from neoquant.model.cache import TAKEN_BACK, KVCache
from neoquant.model.gpt_neo import CausalLM

MOST_DRAFTED = 7
"""Guesses that are checked together, at most: with the token before them they are 8 rows."""

USUALLY_DRAFTED = 3
"""With the token before them they are 4 rows, for which products read a weight once; more only pay where most guesses
are right."""


class Draft(NamedTuple):
    """Guessed `tokens` int64 `[k]`, and the probabilities `[k, V]` that each was drawn with; None: for certain."""

    tokens: Tensor
    probabilities: Tensor | None = None


class Drafter(Protocol):
    """Whoever guesses."""

    is_free: bool
    """Whether guesses cost next to nothing beside checking them."""

    def propose(self, ids: Sequence[int], most: int, generator: torch.Generator | None) -> Draft:
        """At most so many tokens behind `ids`, which begin as those of the call before; perhaps none."""


class PromptLookup:
    """What followed the last time that the text ended like this: prompt lookup decoding (Saxena, 2023).

    The longest of the last `longest` to `shortest` tokens that stood there before decides, its latest place first.
    """

    is_free = True

    def __init__(self, longest: int = 4, shortest: int = 2, most: int = MOST_DRAFTED) -> None:
        """`most` tokens are guessed at once."""
        self.longest, self.shortest, self.most = longest, shortest, most
        self._behind: dict[tuple[int, ...], int] = {}
        self._read = 0

    def propose(self, ids: Sequence[int], most: int, generator: torch.Generator | None = None) -> Draft:
        while self._read < len(ids) - 1:  # the last token is followed by nothing yet
            self._read += 1
            for length in range(self.shortest, min(self.longest, self._read) + 1):
                self._behind[tuple(ids[self._read - length : self._read])] = self._read
        for length in range(min(self.longest, len(ids)), self.shortest - 1, -1):
            found = self._behind.get(tuple(ids[len(ids) - length :]))
            if found is not None:
                return Draft(torch.tensor(ids[found : found + min(most, self.most)], dtype=torch.int64))
        return Draft(torch.empty(0, dtype=torch.int64))


class ModelDrafter:
    """A model of the same vocabulary that is faster, as one with fewer layers or bits. It draws as `sampling` says."""

    is_free = False

    def __init__(self, model: CausalLM, sampling: Sampling, cache_dtype: str | None = None) -> None:
        self.model, self.sampling = model, sampling
        self._cache, self._passes = KVCache.of(model.config, storage=cache_dtype), Passes(model)
        self._held: list[int] = []  # the ids that the cache has seen

    def propose(self, ids: Sequence[int], most: int, generator: torch.Generator | None) -> Draft:
        most = min(most, self.model.config.max_position_embeddings - len(ids) + 1)
        if most < 1:
            return Draft(torch.empty(0, dtype=torch.int64))
        # What was guessed wrong is taken back, and the last token is read again: its logits are wanted.
        right = next((i for i, pair in enumerate(zip(self._held, ids, strict=False)) if pair[0] != pair[1]), None)
        right = min(len(self._held), len(ids)) if right is None else right
        right = min(right, len(ids) - 1)
        if self._cache.length - right > TAKEN_BACK:  # another text
            self._cache, right = KVCache.of(self.model.config, storage=self._cache.storage), 0
        self._cache.crop(right)
        seen, drawn = list(ids), []
        for _ in range(most):
            new = torch.tensor([seen[self._cache.length :]], device=self.model.device)
            logits = self._passes.logits(new, self._cache)[:, -1]
            self._held = list(seen)
            before = torch.tensor([seen if self.sampling.looks_back else []], dtype=torch.int64, device=logits.device)
            if self.sampling.temperature == 0:
                seen.append(int(choose(logits, before, self.sampling, None).token))
                continue
            probabilities, _ = distribution(logits, before, self.sampling)
            drawn.append(probabilities)
            seen.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        return Draft(torch.tensor(seen[len(ids) :]), torch.cat(drawn) if drawn else None)


def require_same_vocabulary(model: CausalLM, draft: CausalLM) -> None:
    """Raise RequestError where a model cannot guess another's tokens."""
    ours, theirs = model.config.vocab_size, draft.config.vocab_size
    if ours != theirs:
        raise RequestError(f"the draft model knows {theirs} tokens, the model {ours}: it needs the same vocabulary")


def drafter_of(model: CausalLM, draft: CausalLM | None, lookup: int | None, sampling: Sampling) -> Drafter:
    """Whoever guesses for `model`: a draft model, or what the text says, `lookup` tokens at a time.

    Raises RequestError for both at once, another vocabulary, or no legal number of tokens.
    """
    if draft is None:
        if lookup is None or lookup < 1:
            raise RequestError(f"prompt_lookup_num_tokens is {lookup}; legal is at least 1")
        return PromptLookup(most=lookup)
    if lookup:
        raise RequestError("assistant_model and prompt_lookup_num_tokens both guess the next tokens: give one of them")
    require_same_vocabulary(model, draft)
    return ModelDrafter(draft, sampling)
