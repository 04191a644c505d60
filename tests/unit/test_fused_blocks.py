"""Few positions through all blocks in one call: the bits that block after block gives, or nothing done."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from switch import every_isa, forced
from test_fused_block import GRIDS, change_type, generate, listen, make, patch, replace, train, train_a_part
from torch import Tensor

from neoquant import native
from neoquant.loading.pretrained import GPTNeoModel, load
from neoquant.model.cache import KVCache
from neoquant.nn.fused_blocks import _ROWS, ROWS_AT_ONCE, WORK_AT_ONCE, fused_blocks

needs_native = pytest.mark.skipif(native.active().library is None, reason=native.active().reason)
IDS = torch.arange(8)[None]


def made(**asked: Any) -> tuple[GPTNeoModel, list[bool]]:
    """A network whose blocks are taken at once, and whether they were, call by call."""
    model, taken = make(**asked), []

    def told(*arguments: Any) -> Tensor | None:
        y = fused_blocks(*arguments)
        taken.append(y is not None)
        return y

    model.steps = told
    return model, taken


def one_by_one(model: GPTNeoModel, *arguments: Any) -> Tensor:
    """What `generate` gives where each block is called."""
    steps, model.steps = model.steps, None
    found, _ = generate(model, *arguments)
    model.steps = steps
    return found


@every_isa
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_bits_are_those_of_block_after_block(isa: str, data: st.DataObject) -> None:
    """With padding and without, in buffers that slide and grow, for sequences that end early."""
    model, taken = made(
        grid=data.draw(st.sampled_from(GRIDS)), seed=data.draw(st.integers(0, 99)), context=120,
        window_size=data.draw(st.sampled_from([1, 3, 9, 200])),
    )  # fmt: skip
    rows, prompt, at_once = data.draw(st.sampled_from([(1, 1, 1), (1, 30, 3), (3, 2, 1), (5, 7, 12), (2, 40, 9)]))
    storage = data.draw(st.sampled_from([None, "float16", "int8"]))
    length = prompt + at_once * data.draw(st.sampled_from([1, 2, 5]))
    ids = torch.randint(0, 17, (rows, length), generator=torch.Generator().manual_seed(rows))
    keep = torch.arange(length) >= torch.arange(rows)[:, None] if data.draw(st.booleans()) else None
    work = data.draw(st.sampled_from([1, WORK_AT_ONCE]))
    with (
        forced(isa, data.draw(st.sampled_from([1, 3]))),
        mock.patch("neoquant.nn.fused_blocks.WORK_AT_ONCE", work),
        torch.inference_mode(),
    ):
        found, cache = generate(model, ids, prompt, keep, at_once, storage)
        assert taken == [rows * prompt <= ROWS_AT_ONCE or work > 1, *[True] * (len(taken) - 1)]
        assert torch.equal(found, one_by_one(model, ids, prompt, keep, at_once, storage))
        assert cache.length == length


@needs_native
def test_a_cache_may_lose_positions_and_sequences() -> None:
    model, taken = made()
    ids = torch.randint(0, 17, (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        cache = KVCache.of(model.config)
        model(ids[:, :7], past_key_values=cache)
        cache.crop(5)
        cache.select(torch.tensor([2, 0]))
        found = model(ids[[2, 0], 5:], past_key_values=cache).last_hidden_state
        expected = model(ids[[2, 0]], use_cache=True).last_hidden_state[:, 5:]
    assert taken == [True] * 3 and torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def stop_a_block(model: GPTNeoModel) -> None:
    model.h[1].step = None


def listen_to_a_block(model: GPTNeoModel) -> None:
    model.h[1].register_forward_hook(lambda *arguments: None)


def patch_a_block(model: GPTNeoModel) -> None:
    model.h[1].forward = model.h[1].forward


@needs_native
@pytest.mark.parametrize(
    "change",
    [change_type, train, train_a_part, listen, replace, patch, stop_a_block, listen_to_a_block, patch_a_block],
)
@pytest.mark.parametrize("late", [False, True])
def test_what_is_not_done_goes_the_ordinary_way(change: Callable[[GPTNeoModel], None], late: bool) -> None:
    """Whether it was so from the first step on or not."""
    model, taken = made()
    with torch.inference_mode():
        if late:
            generate(model, IDS, 5)
            assert taken and all(taken)
            taken.clear()
        change(model)
        found, _ = generate(model, IDS, 5)
        assert taken and not any(taken) and torch.equal(found, one_by_one(model, IDS, 5))


@needs_native
def test_changed_blocks_are_seen() -> None:
    """Blocks in another order, other weights, and fewer blocks than the cache has layers."""
    model, taken = made()
    with torch.inference_mode():
        before, _ = generate(model, IDS, 5)
        model.h[0].mlp, model.h[1].mlp = model.h[1].mlp, model.h[0].mlp
        exchanged, _ = generate(model, IDS, 5)
        assert not torch.equal(before, exchanged) and torch.equal(exchanged, one_by_one(model, IDS, 5))
        model.h[1].ln_2.weight.data = model.h[1].ln_2.weight * 2
        assert torch.equal(generate(model, IDS, 5)[0], one_by_one(model, IDS, 5)) and all(taken)
        taken.clear()
        model.h = model.h[:1]
        generate(model, IDS, 5)
        assert not any(taken)


@needs_native
def test_weights_that_were_replaced_are_let_go() -> None:
    model, _ = made()
    with torch.inference_mode():
        generate(model, IDS, 5)
        held = weakref.ref(model.h[0].ln_1.weight)
        model.h[0].ln_1 = torch.nn.LayerNorm(40).eval()
        generate(model, IDS, 5)
        gc.collect()
        assert held() is None
        model.bfloat16()
        generate(model, IDS, 5)
        assert model.h not in _ROWS


@needs_native
def test_several_callers_have_a_cache_each() -> None:
    """The model is shared, and what is held is not."""
    model, _ = made(hidden_size=64, num_heads=2)
    texts = [torch.randint(0, 17, (1, 30), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    found: dict[int, Tensor] = {}

    def work(number: int) -> None:
        with torch.inference_mode():
            for _ in range(5):
                found[number] = generate(model, texts[number], 3 + number)[0]

    callers = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    with torch.inference_mode():
        for number, text in enumerate(texts):
            assert torch.equal(found[number], one_by_one(model, text, 3 + number))


@needs_native
def test_loaded_models_take_all_blocks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bool] = []

    def told(*arguments: Any) -> Tensor | None:
        y = fused_blocks(*arguments)
        taken.append(y is not None)
        return y

    monkeypatch.setattr("neoquant.loading.load.fused_blocks", told)
    model, _ = load()
    model.generate([[1, 2, 3]], max_new_tokens=3)
    assert taken == [True] * 3


@needs_native
def test_torch_computes_alone_beside_the_library_and_has_its_threads_again() -> None:
    """Behind an error as well."""
    model, taken = made()
    found: list[int] = []
    for part in (model.wte, model.wpe, model.ln_f):
        part.register_forward_hook(lambda *_: found.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with torch.inference_mode():
            model(IDS)
        assert found == [1, 1, 1] and taken == [True] and torch.get_num_threads() == 3
        with torch.inference_mode(), pytest.raises(IndexError):
            model(IDS + 17)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
