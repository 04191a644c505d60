"""Choosing tokens, stopping, streaming."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neoquant.errors import ContextError, RequestError
from neoquant.generation.generate import Sampling, draw, filter_logits, penalize, stream
from neoquant.generation.text import TextStream, generate_text
from neoquant.loading.pretrained import GPTNeoForCausalLM
from neoquant.model.config import GPTNeoConfig
from neoquant.tokenizer.tokenizer import Tokenizer

CONFIG = GPTNeoConfig(
    vocab_size=33, max_position_embeddings=24, hidden_size=16, num_heads=2, num_layers=2, window_size=3,
    attention_types=[[["global", "local"], 1]], bos_token_id=0, eos_token_id=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> GPTNeoForCausalLM:
    model = GPTNeoForCausalLM(CONFIG).init_weights(seed=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    return model


def byte_tokenizer() -> Tokenizer:
    """One token a byte, and an end of text: enough to see characters split over tokens."""
    import tokenizers

    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocab = {"<|endoftext|>": 0} | {letter: i + 1 for i, letter in enumerate(sorted(alphabet))}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(backend)


def test_greedy_equals_taking_the_best_of_uncached_passes(model: GPTNeoForCausalLM) -> None:
    ids = torch.tensor([[5, 9, 2], [7, 7, 1]])
    got = model.generate(ids, max_new_tokens=15, eos_token_id=[])
    for _ in range(15):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1)[:, None]], 1)
    assert got.tolist() == ids.tolist()


def test_greedy_with_penalty_equals_transformers(model: GPTNeoForCausalLM) -> None:
    transformers = pytest.importorskip("transformers")
    values = {k: v for k, v in CONFIG.to_dict().items() if k != "attention_layers"}
    theirs = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**values)).eval()
    theirs.load_state_dict(model.state_dict())
    ids = torch.tensor([[5, 9, 2]])
    for penalty in (1.0, 1.7):
        expected = theirs.generate(
            ids, max_new_tokens=12, do_sample=False, repetition_penalty=penalty, pad_token_id=0, eos_token_id=0
        )
        assert model.generate(ids, max_new_tokens=12, repetition_penalty=penalty).tolist() == expected.tolist()


PROMPTS = ([5, 9, 2, 30, 8, 11], [7], [4, 4, 1, 3], [0, 6])


@pytest.mark.parametrize("penalty", [1.0, 1.7])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_a_padded_row_is_continued_as_it_would_be_alone(model: GPTNeoForCausalLM, side: str, penalty: float) -> None:
    ids, mask = torch.full((4, 8), 17), torch.zeros(4, 8, dtype=torch.int64)
    for row, prompt in enumerate(PROMPTS):
        at = {"left": 8 - len(prompt), "right": 0, "both": 1}[side]
        ids[row, at : at + len(prompt)], mask[row, at : at + len(prompt)] = torch.tensor(prompt), 1
    options = {"max_new_tokens": 12, "repetition_penalty": penalty, "eos_token_id": []}
    together = model.generate(ids, mask, **options)
    assert torch.equal(together[:, :8], ids)
    for row, prompt in enumerate(PROMPTS):
        assert together[row, 8:].tolist() == model.generate(prompt, **options)[0, len(prompt) :].tolist()


def test_left_padding_equals_transformers(model: GPTNeoForCausalLM) -> None:
    transformers = pytest.importorskip("transformers")
    values = {k: v for k, v in CONFIG.to_dict().items() if k != "attention_layers"}
    theirs = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**values)).eval()
    theirs.load_state_dict(model.state_dict())
    ids, mask = torch.tensor([[17, 17, 5, 9], [3, 8, 1, 2]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    expected = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=32
    )
    assert model.generate(ids, mask, max_new_tokens=12, eos_token_id=32).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("mask", "message"), [([[1, 1]], r"is \[1, 2\], but input_ids is \[1, 3\]"), ([[0, 0, 0]], "leaves a row no token")]
)
def test_masks_that_say_nothing_are_refused(model: GPTNeoForCausalLM, mask: list[list[int]], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        model.generate([[1, 2, 3]], torch.tensor(mask))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 999), st.integers(0, 12), st.floats(0.01, 1.0), st.floats(0.2, 3.0))
def test_filters_equal_their_definitions(seed: int, top_k: int, top_p: float, temperature: float) -> None:
    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(seed))
    kept = filter_logits(logits, Sampling(temperature, top_k, top_p)).isfinite()[0]
    order = logits[0].argsort(descending=True).tolist()
    allowed = order[: top_k or None]
    probabilities = (logits[0][allowed].double() / temperature).softmax(-1)
    before = probabilities.cumsum(0) - probabilities

    def least(p: float) -> set[int]:
        return {token for token, reached in zip(allowed, before.tolist(), strict=True) if reached < p}

    got = set(kept.nonzero()[:, 0].tolist())
    assert least(top_p - 1e-6) <= got <= least(top_p + 1e-6)  # float32 sums may fall on either side
    assert order[0] in got


def test_penalty_makes_seen_tokens_less_likely() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    assert penalize(logits, torch.tensor([[0, 1, 1]]), 2.0).tolist() == [[1.0, -4.0, 1.0]]


@pytest.mark.parametrize("rows", [1, 5])
def test_tokens_are_drawn_as_torch_draws_them(rows: int) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        logits = torch.randn(rows, 40).masked_fill(torch.rand(rows, 40) < 0.5, -torch.inf)
        logits[:, 7] = 0
        ours, theirs = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
        for _ in range(3):
            expected = torch.multinomial(logits.softmax(-1), 1, generator=theirs)[:, 0]
            assert torch.equal(draw(logits.softmax(-1), ours), expected)


def test_a_seed_repeats_and_another_differs(model: GPTNeoForCausalLM) -> None:
    ids = torch.tensor([[5, 9, 2]])
    options = {"max_new_tokens": 18, "do_sample": True, "temperature": 3.0, "top_k": 0, "eos_token_id": []}
    first, again, other = (model.generate(ids, seed=seed, **options).tolist() for seed in (1, 1, 2))  # type: ignore[arg-type]
    assert first == again != other


def test_rows_end_at_end_of_text_and_repeat_it(model: GPTNeoForCausalLM) -> None:
    ids = torch.tensor([[5, 9, 2], [7, 7, 1]])
    free = model.generate(ids, max_new_tokens=12, eos_token_id=[])
    end = int(free[0, 5])
    stopped = model.generate(ids, max_new_tokens=12, eos_token_id=end)
    for row, whole in zip(stopped.tolist(), free.tolist(), strict=True):
        at = whole.index(end, 3) if end in whole[3:] else len(whole)
        assert row[: at + 1] == whole[: at + 1][: len(row)]
        assert set(row[at + 1 :]) <= {end}


@pytest.mark.parametrize("every", [2, 3, 8, 100])
@pytest.mark.parametrize("ending", ["eos", "stop", "both", "none"])
def test_looking_at_several_ids_at_once_changes_none(model: GPTNeoForCausalLM, every: int, ending: str) -> None:
    ids, keep = torch.tensor([[5, 9, 2], [0, 7, 1]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    free = [row.tolist() for row in stream(model, ids, attention_mask=keep, max_new_tokens=12)]
    eos = (free[5][0], free[3][1]) if ending in ("eos", "both") else ()
    shown: list[tuple[list[list[int]], list[list[bool]]]] = []

    def stop(seen: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        assert kept is not None
        shown.append((seen.tolist(), kept.tolist()))
        return (seen == free[7][0]).sum(1) > 1

    def made(look_every: int) -> list[list[int]]:
        options = {
            "attention_mask": keep,
            "max_new_tokens": 12,
            "sampling": Sampling(eos_token_ids=eos, pad_token_id=3),
        }
        stops = stop if ending in ("stop", "both") else None
        return [row.tolist() for row in stream(model, ids, stop=stops, look_every=look_every, **options)]  # type: ignore[arg-type]

    expected, first, shown = made(1), shown, []
    assert made(every) == expected and shown == first
    assert (len(expected) < 12) == (ending in ("eos", "both"))


def test_beyond_the_context_is_refused_before_anything_is_generated(model: GPTNeoForCausalLM) -> None:
    with pytest.raises(ContextError, match=r"20 tokens of prompt and 5 new .* 25; .* context is 24: .* at most 4"):
        model.generate(torch.zeros(1, 20, dtype=torch.long), max_new_tokens=5)
    with pytest.raises(ContextError, match="the prompt has 25 tokens; this model's context is 24"):
        model.generate(torch.zeros(1, 25, dtype=torch.long), max_new_tokens=1)
    with pytest.raises(RequestError, match="the prompt is empty"):
        model.generate(torch.zeros(1, 0, dtype=torch.long))
    assert model.generate(torch.zeros(1, 20, dtype=torch.long), max_new_tokens=4, eos_token_id=[]).shape == (1, 24)


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"repetition_penalty": 0.0}])
def test_illegal_sampling_is_named(bad: dict[str, float]) -> None:
    with pytest.raises(RequestError, match=next(iter(bad))):
        Sampling(**bad)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=30))
def test_streamed_text_never_breaks_a_character(text: str) -> None:
    tokenizer = byte_tokenizer()
    pieces: list[str] = []
    out = TextStream(tokenizer, pieces.append)
    for token in tokenizer.encode(text):
        out.put(token)
    out.end()
    assert "".join(pieces) == text == tokenizer.decode(tokenizer.encode(text))
    assert all("\ufffd" not in piece or "\ufffd" in text for piece in pieces)


def test_generated_text_is_what_was_streamed() -> None:
    tokenizer = byte_tokenizer()
    config = GPTNeoConfig(
        vocab_size=257, max_position_embeddings=64, hidden_size=16, num_heads=2, num_layers=2, window_size=3,
        attention_types=[[["global", "local"], 1]], bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPTNeoForCausalLM(config).init_weights(seed=0).eval()
    pieces: list[str] = []
    text = generate_text(model, tokenizer, "héllo", max_new_tokens=20, on_text=pieces.append)
    assert text == "".join(pieces)
    assert generate_text(model, tokenizer, "", max_new_tokens=3) is not None


@pytest.mark.parametrize("storage", [None, "int8"])
@pytest.mark.parametrize("sampled", [False, True])
def test_rows_that_have_ended_are_not_computed(
    model: GPTNeoForCausalLM, sampled: bool, storage: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the others go on as beside them: with the same draws, as transformers has them."""
    ids, mask = torch.tensor([[17, 5, 9], [3, 8, 1], [17, 17, 7], [4, 4, 1]]), torch.ones(4, 3, dtype=torch.int64)
    mask[0, 0] = mask[2, :2] = 0
    rows: list[int] = []
    real = model.transformer.forward

    def counted(ids: torch.Tensor, *arguments: object, **options: object) -> object:
        rows.append(len(ids))
        return real(ids, *arguments, **options)

    monkeypatch.setattr(model.transformer, "forward", counted)
    options = {"max_new_tokens": 20, "do_sample": sampled, "top_k": 0, "pad_token_id": 17, "cache_dtype": storage}
    torch.manual_seed(1)
    whole = model.generate(ids, mask, eos_token_id=[], **options)[:, 3:]
    ends = whole[torch.arange(3), torch.tensor([3, 11, 6])].tolist()
    rows.clear()
    torch.manual_seed(1)
    found = model.generate(ids, mask, eos_token_id=ends, **options)[:, 3:]
    lengths = []
    for row, all_of_it in zip(found, whole, strict=True):
        length = next((i + 1 for i, token in enumerate(all_of_it.tolist()) if token in ends), 20)
        assert row[:length].tolist() == all_of_it[: min(length, found.shape[1])].tolist()
        assert set(row[length:].tolist()) <= {17}
        lengths.append(length)
    assert len(set(lengths)) > 1 and rows == [sum(length > step for length in lengths) for step in range(max(lengths))]
