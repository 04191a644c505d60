"""Several tokens for one reading of the weights: guessed by a drafter, checked together by the model.

Speculative sampling (Leviathan et al., 2023, algorithm 1; Chen et al., 2023): a guess that was drawn with probability
q and has probability p is taken with probability min(1, p / q); in place of the first that is not, the next token is
drawn from what p has beyond q. What comes has the model's own distribution whatever the guesses are; greedily, its own
tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neoquant.errors import RequestError
from neoquant.generation.drafting import MOST_DRAFTED, USUALLY_DRAFTED, Draft, Drafter
from neoquant.generation.generate import NOTHING, Endings, Sampling, Stop, check_room, choose, distribution, no_choice
from neoquant.generation.passes import Passes
from neoquant.model.cache import KVCache
from neoquant.model.gpt_neo import CausalLM
from neoquant.native.step import rows_alike


@dataclass
class Acceptance:
    """How well guessing went: `steps` of the model, guesses that were `drafted`, and those that were `accepted`."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    def __str__(self) -> str:
        made = self.steps + self.accepted
        rate = 100 * self.accepted / max(1, self.drafted)
        return f"{made / max(1, self.steps):.2f} tokens a step, {rate:.0f} % of {self.drafted} guesses accepted"


def verdicts(p: Tensor, draft: Draft) -> tuple[Tensor, Tensor]:
    """Of `draft`'s k guesses: with which probability each is taken, `[k]`, and the probabilities of what stands in
    its place where it is not, `[k, V]`; p `[k, V]` are the model's, given what is before each."""
    at = draft.tokens.to(p.device)[:, None]
    q = draft.probabilities
    q = torch.zeros_like(p).scatter_(-1, at, 1.0) if q is None else q.to(p.device)
    taken = (p.gather(-1, at) / q.gather(-1, at))[:, 0].clamp(max=1)
    left = (p - q).clamp(min=0)
    mass = left.sum(-1, keepdim=True)
    # Where nothing is left, p equals q, and what is drawn there is always taken but for a rounding.
    return taken, torch.where(mass > 0, left / mass.where(mass > 0, 1.0), p)


@torch.inference_mode()
def stream_with_drafts(
    model: CausalLM,
    input_ids: Tensor,
    drafter: Drafter,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Stop | None = None,
    cache_dtype: str | None = None,
    static_cache: bool = False,
    acceptance: Acceptance | None = None,
    steady: bool = False,
) -> Iterator[Tensor]:
    """Yield the next ids `[1]` of `input_ids[1, T]` as `generate.stream` does; `acceptance` counts how it went.

    No more guesses are checked together than get the bits that each would get alone from the native library: greedily
    its tokens are the same. (torch rounds otherwise for several rows, which may decide between two equally likely.)
    Sampled, they have the same distribution, but a seed draws others.

    `steady` is that of `stream`.

    Raises RequestError for several prompts, for `static_cache` on a GPU, and what `stream` does.
    """
    sampling, acceptance = sampling or Sampling(), acceptance or Acceptance()
    if len(input_ids) != 1:
        raise RequestError(f"{len(input_ids)} prompts are given; drafts are for one prompt at a time")
    if static_cache and model.device.type != "cpu":
        raise RequestError("drafts are checked together, which a static cache does not hold: leave one out")
    check_room(model, input_ids.shape[1], max_new_tokens)
    generator = None if sampling.seed is None else torch.Generator().manual_seed(sampling.seed)
    endings = Endings(input_ids, None, sampling, stop, max_new_tokens)
    ids: list[int] = input_ids[0].tolist()
    last = len(ids) + max_new_tokens
    most = min(MOST_DRAFTED, rows_alike() - 1)
    cache = KVCache.of(model.config, last + MOST_DRAFTED, cache_dtype)
    passes, width, whole = Passes(model, steady), USUALLY_DRAFTED, 0  # passes in which all guesses were right
    while len(ids) < last:
        room = min(width, most, last - len(ids) - 1)
        # The prompt is read alone: what comes of many positions need not be what comes of one.
        draft = drafter.propose(ids, room if cache.length else 0, generator)
        tokens, unusable = _check(passes, cache, ids, draft, sampling, last - max_new_tokens, generator)
        accepted, drafted = len(tokens) - 1, len(draft.tokens)
        whole = whole + 1 if drafted and accepted == drafted else 0
        width = MOST_DRAFTED if whole > 1 else USUALLY_DRAFTED
        if not drafter.is_free:
            width = min(width, accepted + 1 if accepted < drafted else accepted + 2)
        acceptance.steps += 1
        acceptance.drafted += drafted
        acceptance.accepted += accepted
        for number, token in enumerate(tokens):
            ids.append(token)
            chosen, _, is_last = endings.take(torch.tensor([token], dtype=input_ids.dtype))
            if number == accepted and unusable is not None:
                raise no_choice(model, len(ids) - (last - max_new_tokens), sampling, unusable)
            yield chosen
            if is_last:
                return


def _check(
    passes: Passes, cache: KVCache, ids: list[int], draft: Draft, sampling: Sampling, prompt: int,
    generator: torch.Generator | None,
) -> tuple[list[int], Tensor | None]:  # fmt: skip
    """The guesses that are taken and the token behind them, and, where there was none to choose, the logits `[1, V]`
    that it was to be chosen by; `cache` then holds all but the last. The first `prompt` of `ids` were given."""
    guesses, k, held = draft.tokens.tolist(), len(draft.tokens), cache.length
    new = torch.tensor([[*ids[held:], *guesses]], device=passes.device)
    logits = passes.logits(new, cache, k + 1)[0]
    for row in range(min(k + 1, sampling.min_new_tokens - (len(ids) - prompt))):
        ends = [end for end in sampling.eos_token_ids or () if 0 <= end < logits.shape[-1]]
        logits[row, ends] = -torch.inf
    seen = _seen(ids, draft, sampling).to(passes.device)
    if sampling.temperature == 0:
        likeliest, finite, _ = choose(logits, seen, sampling, None)
        tokens, usable = likeliest.tolist(), finite.tolist()
        accepted = next((i for i, guess in enumerate(guesses) if guess != tokens[i] or not usable[i]), k)
        next_token = tokens[accepted]
    else:
        p, finite = distribution(logits, seen, sampling)
        p, usable = p.cpu(), finite.tolist()
        accepted = 0
        following = p[k]
        if k:
            taken, instead = verdicts(p[:k], draft)
            chances = torch.rand(k, generator=generator)
            refused = ((chances >= taken) | ~torch.tensor(usable[:k])).nonzero()
            accepted = k if len(refused) == 0 else int(refused[0])
            following = p[k] if accepted == k else instead[accepted]
        next_token = int(torch.multinomial(following, 1, generator=generator)) if usable[accepted] else 0
    cache.crop(len(ids) + accepted)
    return [*guesses[:accepted], next_token], None if usable[accepted] else logits[accepted, None]


def _seen(ids: list[int], draft: Draft, sampling: Sampling) -> Tensor:
    """All before each position that is checked, `[k + 1, S]`, where that is asked for, behind NOTHING."""
    k = len(draft.tokens)
    if not sampling.looks_back:
        return torch.empty(k + 1, 0, dtype=torch.int64)
    text = torch.tensor([*[NOTHING] * k, *ids, *draft.tokens.tolist()])
    return text.unfold(0, k + len(ids), 1)
