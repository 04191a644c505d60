"""Drafts change how fast tokens come, and not which."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neoquant.errors import RequestError
from neoquant.generation.drafting import Draft, ModelDrafter, PromptLookup
from neoquant.generation.generate import Sampling, distribution, stream
from neoquant.generation.speculative import Acceptance, stream_with_drafts, verdicts
from neoquant.loading.pretrained import GPTNeoForCausalLM
from neoquant.model.config import GPTNeoConfig


def make(vocabulary: int = 13, seed: int = 0, layers: int = 2, scale: float = 8.0) -> GPTNeoForCausalLM:
    config = GPTNeoConfig(
        vocab_size=vocabulary, max_position_embeddings=120, hidden_size=16, num_heads=2, num_layers=layers,
        window_size=5, attention_types=[[["global", "local"], layers // 2]], bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPTNeoForCausalLM(config).init_weights(seed=seed).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


class Scripted:
    """Guesses that are sometimes what the model takes, and sometimes not."""

    is_free = True

    def __init__(self, truth: Sequence[int], seed: int) -> None:
        self.truth, self.generator = truth, torch.Generator().manual_seed(seed)

    def propose(self, ids: Sequence[int], most: int, generator: torch.Generator | None) -> Draft:
        guesses = torch.tensor(self.truth[len(ids) : len(ids) + most], dtype=torch.int64)
        wrong = torch.rand(len(guesses), generator=self.generator) < 0.3
        return Draft(torch.where(wrong, (guesses + 1) % 13, guesses))


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("kind", ["scripted", "lookup", "model", "itself"])
def test_greedy_tokens_are_the_same(kind: str, penalty: float) -> None:
    ends = {} if kind == "itself" else {"eos_token_ids": (3,), "min_new_tokens": 40}  # which it would not know of
    model, sampling = make(), Sampling(repetition_penalty=penalty, **ends)
    prompt = torch.tensor([[5, 9, 2, 7, 5, 9]])
    expected = [int(ids) for ids in stream(model, prompt, max_new_tokens=110, sampling=sampling)]
    drafter = {
        "scripted": Scripted([*prompt[0].tolist(), *expected], 1), "lookup": PromptLookup(),
        "model": ModelDrafter(make(seed=1), sampling), "itself": ModelDrafter(make(), sampling),
    }[kind]  # fmt: skip
    count = Acceptance()
    found = stream_with_drafts(model, prompt, drafter, max_new_tokens=110, sampling=sampling, acceptance=count)
    assert [int(ids) for ids in found] == expected
    assert count.accepted <= count.drafted and count.steps + count.accepted >= len(expected)
    if kind == "itself":
        assert count.accepted == count.drafted > count.steps


@pytest.mark.parametrize(
    "ruled_out",
    [{"bad_words_ids": ((3, 7), (3, 1), (4, 2, 4))}, {"no_repeat_ngram_size": 2}, {"suppress_tokens": (3, 7)}],
    ids=lambda ruled_out: next(iter(ruled_out)),
)
def test_what_may_not_come_does_not_come_with_drafts(ruled_out: dict[str, Any]) -> None:
    model, sampling, prompt = make(), Sampling(**ruled_out), torch.tensor([[5, 9, 2, 7, 5, 9]])
    expected = [int(ids) for ids in stream(model, prompt, max_new_tokens=60, sampling=sampling)]
    assert expected != [int(ids) for ids in stream(model, prompt, max_new_tokens=60)]
    truth = [*prompt[0].tolist(), *(int(ids) for ids in stream(model, prompt, max_new_tokens=60))]
    for drafter in (PromptLookup(), Scripted(truth, 1), ModelDrafter(make(seed=1), sampling)):
        found = stream_with_drafts(model, prompt, drafter, max_new_tokens=60, sampling=sampling)
        assert [int(ids) for ids in found] == expected


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 5), st.integers(1, 3), st.booleans(), st.integers(0, 999))
def test_what_is_taken_or_drawn_instead_has_the_models_distribution(V: int, k: int, certain: bool, seed: int) -> None:
    """Summed over every draft that may come, with p and q that depend on all before."""
    generator = torch.Generator().manual_seed(seed)

    def conditional() -> dict[tuple[int, ...], Tensor]:
        logits = {path: torch.randn(V, generator=generator) * 2 for path in paths}
        return {
            path: each.where(torch.rand(V, generator=generator) > 0.2, -1e9).softmax(-1)
            for path, each in logits.items()
        }

    paths = [path for length in range(k + 1) for path in itertools.product(range(V), repeat=length)]
    p, q = conditional(), conditional()
    if certain:
        q = {path: torch.eye(V)[int(each.argmax())] for path, each in q.items()}
    found = dict.fromkeys(itertools.product(range(V), repeat=k + 1), 0.0)
    for draft in itertools.product(range(V), repeat=k):
        weight = float(torch.stack([q[draft[:i]][draft[i]] for i in range(k)]).prod())
        if weight == 0:
            continue
        rows = torch.stack([q[draft[:i]] for i in range(k)])
        taken, instead = verdicts(
            torch.stack([p[draft[:i]] for i in range(k)]), Draft(torch.tensor(draft), None if certain else rows)
        )
        so_far = weight
        for i in range(k + 1):  # the first i are taken, and then another token comes; what follows that is the model's
            for token in range(V):
                chance = so_far * (float((1 - taken[i]) * instead[i][token]) if i < k else float(p[draft][token]))
                begun = (*draft[:i], token)
                for rest in itertools.product(range(V), repeat=k - i):
                    tail = [float(p[(*begun, *rest[:j])][rest[j]]) for j in range(k - i)]
                    found[(*begun, *rest)] += chance * float(torch.tensor(tail).prod())
            so_far *= float(taken[i]) if i < k else 0
    for path, chance in found.items():
        expected = float(torch.stack([p[path[:i]][path[i]] for i in range(k + 1)]).prod())
        assert chance == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("drafting", ["lookup", "model"])
def test_sampled_tokens_have_the_models_distribution(drafting: str) -> None:
    """Of three tokens, drawn 300 times, against their exact probabilities."""
    model, sampling = make(vocabulary=3, scale=5.0), Sampling(temperature=0.9, top_p=0.98)
    draft, prompt, runs = make(vocabulary=3, seed=2, scale=3.0), torch.tensor([[1, 2, 1, 2, 0, 1, 2, 0]]), 300
    counts: dict[tuple[int, ...], int] = {}
    torch.manual_seed(0)
    for _ in range(runs):
        drafter = PromptLookup() if drafting == "lookup" else ModelDrafter(draft, sampling)
        ids = tuple(int(i) for i in stream_with_drafts(model, prompt, drafter, max_new_tokens=3, sampling=sampling))
        counts[ids] = counts.get(ids, 0) + 1
    off = 0.0
    for path in itertools.product(range(3), repeat=3):
        chance = 1.0
        for i in range(3):
            ids = torch.cat([prompt, torch.tensor([path[:i]], dtype=torch.int64)], 1)
            with torch.no_grad():
                chance *= float(distribution(model(ids).logits[:, -1], ids, sampling)[0][0, path[i]])
        if chance == 0:
            assert path not in counts
        else:
            off += (counts.get(path, 0) - runs * chance) ** 2 / (runs * chance)
    assert off < 55  # chi squared with at most 26 degrees of freedom: beyond that once in a thousand seeds


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 5))
def test_lookup_finds_what_followed_the_longest_repetition(ids: list[int], most: int) -> None:
    expected: list[int] = []
    for length in (2, 3, 4):
        places = [i for i in range(len(ids) - length) if ids[i : i + length] == ids[len(ids) - length :]]
        if len(ids) >= length and places:
            expected = ids[places[-1] + length :][:most]
    lookup = PromptLookup()
    for end in range(1, len(ids)):
        lookup.propose(ids[:end], most)
    assert lookup.propose(ids, most).tokens.tolist() == expected


def test_generate_takes_transformers_words_for_it() -> None:
    model = make()
    prompt = [5, 9, 2, 7, 5, 9]
    expected = model.generate(prompt, max_new_tokens=30).tolist()
    assert model.generate(prompt, max_new_tokens=30, prompt_lookup_num_tokens=4).tolist() == expected
    assert (
        model.generate(prompt, torch.ones(1, 6), max_new_tokens=30, assistant_model=make(seed=1)).tolist() == expected
    )
    for options in ({}, {"prompt_lookup_num_tokens": 4}):
        assert (
            model.generate(torch.tensor([prompt], dtype=torch.int32), max_new_tokens=9, **options).dtype == torch.int32
        )
    for message, options in {
        "2 prompts are given": {"input_ids": [prompt, prompt], "prompt_lookup_num_tokens": 3},
        "knows 7 tokens, the model 13": {"input_ids": prompt, "assistant_model": make(7)},
        "both guess": {"input_ids": prompt, "assistant_model": model, "prompt_lookup_num_tokens": 3},
    }.items():  # fmt: skip
        with pytest.raises(RequestError, match=message):
            model.generate(max_new_tokens=3, **options)
    keep = torch.tensor([[0, 1, 1, 1, 1, 1]])  # padding goes with guesses in transformers alone
    padded = model.generate(prompt, keep, max_new_tokens=30, prompt_lookup_num_tokens=3)
    assert padded.tolist() == model.generate(prompt, keep, max_new_tokens=30).tolist()
