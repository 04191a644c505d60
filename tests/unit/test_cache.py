"""Keys and values held beyond the window, in fewer bits, taken back, and row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neoquant.errors import RequestError
from neoquant.loading.pretrained import GPTNeoForCausalLM
from neoquant.model import cache as caches
from neoquant.model.cache import KVCache, cache_bytes
from neoquant.model.config import GPTNeoConfig
from neoquant.model.stored_states import STORAGES, StoredStates

transformers = pytest.importorskip("transformers")

VALUES: dict[str, Any] = {
    "vocab_size": 29, "max_position_embeddings": 64, "hidden_size": 24, "num_heads": 2, "num_layers": 3,
    "attention_types": [[["global", "local", "local"], 1]], "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
LENGTH = 60


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers that slide every few positions."""
    monkeypatch.setattr(caches, "SLIDES", 7)
    monkeypatch.setattr(caches, "TAKEN_BACK", 5)


def pair(window: int, seed: int, implementation: str = "sdpa") -> tuple[Any, GPTNeoForCausalLM]:
    """transformers' network and ours, with the same weights."""
    values = VALUES | {"window_size": window}
    torch.manual_seed(seed)
    theirs = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**values)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(3)  # by 4, attention is so sharp that transformers' own rounding, in float32, is seen
    ours = GPTNeoForCausalLM(GPTNeoConfig(**values), attn_implementation=implementation).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def steps(data: st.DataObject, total: int) -> list[int]:
    """So many positions in pieces of any length."""
    pieces: list[int] = []
    while (left := total - sum(pieces)) > 0:
        pieces.append(data.draw(st.integers(1, left) | st.integers(1, min(left, 6))))
    return pieces


def read(model: Any, ids: Tensor, keep: Tensor, pieces: list[int], cache: KVCache) -> Tensor:
    """Logits of ids[B, T], so many positions at a time."""
    positions, parts, end = (keep.cumsum(1) - 1).clamp(min=0), [], 0
    with torch.inference_mode():
        for piece in pieces:
            begin, end = end, end + piece
            out = model(
                ids[:, begin:end], keep[:, :end], position_ids=positions[:, begin:end], past_key_values=cache
            )  # fmt: skip
            parts.append(out.logits)
    return torch.cat(parts, 1)


def padded(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of ids with padding on the left, none on the first row's."""
    ids = torch.randint(1, 29, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))
    return ids, (torch.arange(LENGTH) >= 9 * torch.arange(rows)[:, None]).long()


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@settings(deadline=None, max_examples=5)
@given(window=st.integers(1, 20), seed=st.integers(0, 99), rows=st.integers(1, 3), data=st.data())
def test_beyond_the_window_logits_are_transformers(
    implementation: str, window: int, seed: int, rows: int, data: st.DataObject
) -> None:
    theirs, ours = pair(window, seed, implementation)
    ids, keep = padded(rows, seed)
    pieces = steps(data, LENGTH) if implementation != "flex_attention" else [31, 20, 1, 8]
    found = read(ours, ids, keep, pieces, KVCache.of(ours.config, data.draw(st.sampled_from([1, 30, LENGTH]))))
    with torch.no_grad():
        expected = theirs(ids, attention_mask=keep, position_ids=(keep.cumsum(1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(found[keep.bool()], expected[keep.bool()], rtol=1e-4, atol=1e-4)


def rounded(states: Tensor, heads: int, storage: str) -> Tensor:
    """states[B, T, C] as a cache holds them, by the definition."""
    if storage != "int8":
        return states.to(getattr(torch, storage)).to(states.dtype)
    by_head = states.unflatten(-1, (heads, -1))
    step = by_head.abs().amax(-1, keepdim=True) / 127
    return ((by_head / step).round() * step).flatten(-2)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("seed", range(3))
def test_what_is_held_in_fewer_bits_is_what_attention_meets(storage: str, seed: int) -> None:
    """As in a network whose keys and values are rounded right where they are made. In float64, lest what lies between
    two steps be rounded otherwise."""
    theirs, ours = (model.double() for model in pair(11, seed))
    for block in theirs.transformer.h:
        for name in ("k_proj", "v_proj"):
            getattr(block.attn.attention, name).register_forward_hook(lambda _m, _i, y: rounded(y, 2, storage))
    ids, keep = padded(2, seed)
    cache = KVCache.of(ours.config, LENGTH, storage)
    found = read(ours, ids, keep, [20, 1, 1, 7, 30, 1], cache)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=keep, position_ids=(keep.cumsum(1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(found[keep.bool()], expected[keep.bool()], rtol=2e-3, atol=2e-3)  # scores are float32
    assert cache.nbytes == cache_bytes(ours.config, LENGTH, 2, storage)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 20), st.integers(1, 40), st.floats(1e-30, 1e30), st.integers(0, 99))
def test_int8_is_off_by_half_a_step_at_most(positions: int, size: int, scale: float, seed: int) -> None:
    states = scale * torch.randn(2, 3, positions, size, generator=torch.Generator().manual_seed(seed))
    states[0, 0, 0] = 0
    held = StoredStates.empty(tuple(states.shape), positions + 2, states, "int8")
    held.write(1, states)
    found = held.read(positions + 1, torch.float64)[:, :, 1:]
    step = states.double().abs().amax(-1, keepdim=True) / 127
    assert bool(((found - states).abs() <= step * (0.5 + 1e-4)).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("storage", STORAGES)
def test_what_is_not_finite_does_not_become_so(storage: str, bad: float) -> None:
    states = torch.ones(1, 1, 2, 5)
    states[0, 0, 1, 3] = bad
    held = StoredStates.empty((1, 1, 2, 5), 2, states, storage)
    held.write(0, states)
    found = held.read(2, torch.float32)[0, 0]
    assert found[0].isfinite().all() and not found[1].isfinite().all()


@pytest.mark.parametrize("storage", [None, "int8"])
@settings(deadline=None, max_examples=5)
@given(data=st.data())
def test_positions_that_are_taken_back_leave_no_trace(storage: str | None, data: st.DataObject) -> None:
    _, ours = pair(data.draw(st.integers(1, 12)), 0)
    ids, keep = padded(2, 1)
    positions = (keep.cumsum(1) - 1).clamp(min=0)
    capacity = data.draw(st.sampled_from([1, LENGTH]))
    ends = [data.draw(st.integers(1, 5)) for _ in range(LENGTH)]

    def read_behind(taken_back: Tensor) -> Tensor:
        """Logits of all positions, each read together with some of `taken_back` behind it."""
        cache, parts = KVCache.of(ours.config, capacity, storage), []
        with torch.inference_mode():
            for begin in range(LENGTH):
                end = min(LENGTH, begin + ends[begin])
                wrong = torch.cat([ids[:, begin : begin + 1], taken_back[:, begin + 1 : end]], 1)
                out = ours(wrong, keep[:, :end], position_ids=positions[:, begin:end], past_key_values=cache)
                parts.append(out.logits[:, :1])
                cache.crop(begin + 1)
        return torch.cat(parts, 1)[keep.bool()]

    found = read_behind(ids.flip(1))
    assert torch.equal(found, read_behind(ids))
    if storage is None:  # int8 rounds what several rows give otherwise in the last place
        expected = read(ours, ids, keep, [1] * LENGTH, KVCache.of(ours.config, LENGTH))
        torch.testing.assert_close(found, expected[keep.bool()], rtol=1e-4, atol=1e-4)


def test_what_was_forgotten_cannot_be_taken_back() -> None:
    _, ours = pair(3, 0)
    cache = KVCache.of(ours.config)
    with torch.inference_mode():
        for at in range(40):
            ours(torch.tensor([[at % 29]]), past_key_values=cache)
    with pytest.raises(RequestError, match="positions cannot be taken back"):
        cache.crop(1)


@pytest.mark.parametrize("storage", [None, *STORAGES])
def test_rows_go_on_without_the_others(storage: str | None) -> None:
    """In float64, lest what lies between two steps be rounded otherwise."""
    ours = pair(4, 2)[1].double()
    ids, keep = padded(4, 3)
    expected = read(ours, ids, keep, [30] + [1] * 30, KVCache.of(ours.config, LENGTH, storage))
    cache, rows = KVCache.of(ours.config, LENGTH, storage), torch.tensor([3, 0])
    positions = (keep.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        read(ours, ids[:, :30], keep[:, :30], [30], cache)
        cache.select(rows)
        for at in range(30, LENGTH):
            out = ours(
                ids[rows, at : at + 1], keep[rows, : at + 1], position_ids=positions[rows, at : at + 1],
                past_key_values=cache,
            )  # fmt: skip
            torch.testing.assert_close(out.logits, expected[rows, at : at + 1], rtol=1e-4, atol=1e-4)


def test_a_type_that_nothing_is_held_in_is_refused() -> None:
    with pytest.raises(RequestError, match="a cache is held in float32, float16, int8, not 'int4'"):
        KVCache(2, storage="int4")
    with pytest.raises(RequestError, match="cache_dtype is 'int4'; legal is float32 or float16 or int8"):
        pair(3, 0)[1].generate([[1]], max_new_tokens=1, cache_dtype="int4")


@pytest.mark.parametrize("storage", STORAGES)
def test_generating_holds_what_was_announced(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with float32, what transformers would have said."""
    theirs, ours = pair(5, 4)
    made: list[KVCache] = []
    real = KVCache.of.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(KVCache, "of", classmethod(lambda cls, *a: made.append(real(cls, *a)) or made[-1]))
    ids = torch.tensor([[5, 9, 2], [7, 7, 1]])
    found = ours.generate(ids, max_new_tokens=50, eos_token_id=[], cache_dtype=storage)
    assert found.shape == (2, 53) and [cache.nbytes for cache in made] == [cache_bytes(ours.config, 53, 2, storage)]
    if storage == "float32":
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=50, do_sample=False,
                                   eos_token_id=None, pad_token_id=0)  # fmt: skip
        assert found.tolist() == expected.tolist()
