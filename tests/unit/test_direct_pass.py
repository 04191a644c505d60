"""A few new positions past the modules: the bits that the network gives, or nothing done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from switch import every_isa, forced
from test_fused_block import GRIDS, make
from torch import Tensor, nn

from neoquant import native
from neoquant.generation.generate import Sampling, generate, stream
from neoquant.grids import Affine, Codebook, Int8Rows
from neoquant.loading.pretrained import GPTNeoForCausalLM
from neoquant.model.cache import KVCache
from neoquant.model.gpt_neo import CausalLM
from neoquant.nn.direct_pass import DirectPass
from neoquant.nn.fused_blocks import ROWS_AT_ONCE, fused_blocks, row_of
from neoquant.nn.linear import QuantEmbedding, QuantLinear, StoredEmbedding, StoredLinear
from neoquant.quantizers import Nearest

needs_native = pytest.mark.skipif(native.active().library is None, reason=native.active().reason)
EMBEDDINGS = [None, torch.float32, torch.float16, torch.bfloat16, Int8Rows(), Codebook(), Affine(4, 16)]


def made(embedding: Any = None, tied: bool = True, **asked: Any) -> tuple[GPTNeoForCausalLM, list[bool]]:
    """A model whose tokens are taken at once, and whether they were, call by call.

    Its embedding is plain (None), or held in a type, or quantized to a grid; so is its head, the same one where `tied`.
    """
    base = make(**asked)
    model = GPTNeoForCausalLM(base.config).init_weights(seed=1).eval()
    model.transformer, base.steps = base, fused_blocks
    model.tie_weights()
    if not tied:
        model.lm_head = nn.Linear(base.config.hidden_size, 17, bias=True)
        model.lm_head.requires_grad_(False)
    if isinstance(embedding, torch.dtype):
        weight = nn.Parameter(base.wte.weight.detach().to(embedding), requires_grad=False)
        base.wte = StoredEmbedding(weight, torch.float32)
        places = nn.Parameter(base.wpe.weight.detach().to(embedding), requires_grad=False)
        base.wpe = StoredEmbedding(places, torch.float32)
        head = weight if tied else nn.Parameter(model.lm_head.weight.detach().to(embedding), requires_grad=False)
        model.lm_head = StoredLinear(head, None if tied else model.lm_head.bias)
    elif embedding is not None:
        base.wte = QuantEmbedding(Nearest().quantize(base.wte.weight.detach(), embedding), torch.float32)
        q = Nearest().quantize(model.lm_head.weight.detach(), embedding)
        model.lm_head = base.wte.table if tied else QuantLinear(q, model.lm_head.bias)
    taken: list[bool] = []

    class Told(DirectPass):
        def logits(self, *arguments: Any) -> Tensor | None:
            found = super().logits(*arguments)
            taken.append(found is not None)
            return found

    model.direct_pass = Told
    return model, taken


def by_modules(model: GPTNeoForCausalLM, *arguments: Any, **options: Any) -> Tensor:
    """What `generate` gives where the network is called."""
    with mock.patch.object(model, "direct_pass", None):
        return generate(model, *arguments, **options)


class Kept:
    """Each token's logits."""

    def __init__(self) -> None:
        self.each: list[Tensor] = []

    def __call__(self, raw: Tensor, scores: Tensor) -> None:
        self.each.append(raw.clone())


@every_isa
@settings(deadline=None, max_examples=16)
@given(data=st.data())
def test_bits_are_those_of_the_network(isa: str, data: st.DataObject) -> None:
    """Of logits and tokens: with padding on either side, in buffers that slide and grow, for rows that end early."""
    model, taken = made(
        data.draw(st.sampled_from(EMBEDDINGS)), data.draw(st.booleans()), grid=data.draw(st.sampled_from(GRIDS)),
        seed=data.draw(st.integers(0, 99)), context=90, window_size=data.draw(st.sampled_from([1, 3, 9, 200])),
    )  # fmt: skip
    rows, prompt = data.draw(st.sampled_from([(1, 1), (1, 30), (3, 2), (5, 7), (2, 40)]))
    ids = torch.randint(0, 17, (rows, prompt), generator=torch.Generator().manual_seed(rows))
    options: dict[str, Any] = {
        "max_new_tokens": data.draw(st.sampled_from([1, 2, 20, 50])),
        "cache_dtype": data.draw(st.sampled_from([None, "float16", "int8"])),
        "sampling": Sampling(
            temperature=data.draw(st.sampled_from([0.0, 1.0])), seed=3,
            repetition_penalty=data.draw(st.sampled_from([1.0, 1.3])),
            eos_token_ids=data.draw(st.sampled_from([None, (3,), (3, 5, 7)])),
        ),
    }  # fmt: skip
    if data.draw(st.booleans()):
        lengths = torch.arange(rows) % prompt
        places = torch.arange(prompt) if data.draw(st.booleans()) else torch.arange(prompt).flip(0)
        options["attention_mask"] = (places >= lengths[:, None]).long()
    found, expected = Kept(), Kept()
    with forced(isa, data.draw(st.sampled_from([1, 3]))):
        made_here = generate(model, ids, record=found, **options)
        assert torch.equal(made_here, by_modules(model, ids, record=expected, **options))
        assert torch.equal(made_here, generate(model, ids, **options))  # looked at once
    assert len(found.each) == len(expected.each) and all(map(torch.equal, found.each, expected.each))
    passes = len(found.each)
    assert taken[:passes] == taken[passes:] == [rows * prompt <= ROWS_AT_ONCE, *[True] * (passes - 1)]


def change_the_embedding(model: GPTNeoForCausalLM) -> None:
    model.transformer.wte.weight.data = model.transformer.wte.weight.data.flip(0)


def replace_the_embedding(model: GPTNeoForCausalLM) -> None:
    model.transformer.wte = nn.Embedding.from_pretrained(torch.randn(17, 40))


def change_the_last_norm(model: GPTNeoForCausalLM) -> None:
    model.transformer.ln_f.weight = nn.Parameter(torch.randn(40), requires_grad=False)


def replace_positions(model: GPTNeoForCausalLM) -> None:
    model.transformer.wpe.weight = nn.Parameter(torch.randn(40, 40), requires_grad=False)


def replace_the_head(model: GPTNeoForCausalLM) -> None:
    model.lm_head = nn.Linear(40, 17).requires_grad_(False)


def replace_a_block(model: GPTNeoForCausalLM) -> None:
    model.transformer.h[1] = make(seed=5).h[1]


def change_a_weight(model: GPTNeoForCausalLM) -> None:
    layer = model.transformer.h[0].mlp.c_fc
    name = next(iter(layer.state))
    layer._buffers[name] = layer._buffers[name].flip(0)


CHANGES = [
    change_the_embedding, replace_the_embedding, change_the_last_norm, replace_positions, replace_the_head,
    replace_a_block, change_a_weight,
]  # fmt: skip


@needs_native
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_two_tokens_counts(change: Callable[[GPTNeoForCausalLM], None]) -> None:
    found = []
    for single in (True, False):
        torch.manual_seed(0)
        model, taken = made()
        if not single:
            model.direct_pass = None
        seen = []
        for at, token in enumerate(stream(model, torch.tensor([[1, 2, 3]]), max_new_tokens=24)):
            seen.append(int(token))
            if at == 8:
                torch.manual_seed(7)
                change(model)
        found.append(seen)
        assert all(taken) and len(taken) == (24 if single else 0)
    unchanged, _ = made()
    assert found[0] == found[1] != generate(unchanged, torch.tensor([[1, 2, 3]]), max_new_tokens=24)[0, 3:].tolist()


@needs_native
@pytest.mark.parametrize("steady", [False, True])
def test_what_steps_rest_on_is_looked_at_once_where_nobody_changes_it(steady: bool) -> None:
    model, taken = made(Int8Rows())
    with mock.patch("neoquant.nn.direct_pass.row_of", side_effect=row_of) as looked:
        assert len(list(stream(model, torch.tensor([[4, 2]]), max_new_tokens=9, steady=steady))) == 9
    assert taken == [True] * 9 and looked.call_count == (1 if steady else 9)


@needs_native
@pytest.mark.parametrize("called", ["streamer", "stop", "processor", "record"])
def test_what_is_called_meanwhile_may_change_the_model(called: str) -> None:
    model, taken = made(Int8Rows())
    what = {
        "streamer": mock.Mock(),
        "stop": lambda ids, keep: torch.zeros(len(ids), dtype=torch.bool),
        "processor": lambda ids, logits: logits,
        "record": lambda raw, scores: None,
    }[called]
    with mock.patch("neoquant.nn.direct_pass.row_of", side_effect=row_of) as looked:
        generate(model, torch.tensor([[4, 2]]), max_new_tokens=9, **{called: what})
        assert taken == [True] * 9 and looked.call_count == 9
        generate(model, torch.tensor([[4, 2]]), max_new_tokens=9)
    assert looked.call_count == 10


def hook(of: Callable[[GPTNeoForCausalLM], nn.Module]) -> Callable[[GPTNeoForCausalLM], None]:
    return lambda model: of(model).register_forward_hook(lambda *arguments: None) and None


def train(model: GPTNeoForCausalLM) -> None:
    model.train()


def patch(model: GPTNeoForCausalLM) -> None:
    model.forward = model.forward


def step_without(model: GPTNeoForCausalLM) -> None:
    model.transformer.steps = None


def compile_it(model: GPTNeoForCausalLM) -> None:
    model._compiled_call_impl = model._call_impl  # what `model.compile()` sets, which takes long


def attend_eagerly(model: GPTNeoForCausalLM) -> None:
    model.set_attn_implementation("eager")


def be_of_another_class(model: GPTNeoForCausalLM) -> None:
    class Other(GPTNeoForCausalLM):
        def forward(self, *arguments: Any, **options: Any) -> Any:
            return super().forward(*arguments, **options)

    model.__class__ = Other


PARTS: list[Callable[[GPTNeoForCausalLM], nn.Module]] = [
    lambda m: m, lambda m: m.transformer, lambda m: m.transformer.wte, lambda m: m.transformer.wpe,
    lambda m: m.transformer.ln_f, lambda m: m.lm_head, lambda m: m.transformer.h[0], lambda m: m.transformer.h[1].mlp,
]  # fmt: skip


@needs_native
@pytest.mark.parametrize(
    "change", [*map(hook, PARTS), train, patch, compile_it, step_without, attend_eagerly, be_of_another_class]
)
@pytest.mark.parametrize("late", [False, True])
def test_what_is_not_done_goes_the_ordinary_way(change: Callable[[GPTNeoForCausalLM], None], late: bool) -> None:
    """Whether it was so from the first token on or not."""
    model, taken = made(Int8Rows())
    seen = []
    if not late:
        change(model)
    for at, token in enumerate(stream(model, torch.tensor([[4, 2]]), max_new_tokens=9)):
        seen.append(int(token))
        if late and at == 3:
            change(model)
    assert taken == [late and at < 4 for at in range(9)]
    assert seen == by_modules(model, torch.tensor([[4, 2]]), max_new_tokens=9)[0, 2:].tolist()


@needs_native
def test_an_adapters_or_anothers_module_is_called() -> None:
    """An embedding or a head of another kind takes part as it is."""

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x)
            return 2 * y

    model, taken = made(Int8Rows())
    model.transformer.wte, model.lm_head = Doubled(model.transformer.wte), Doubled(model.lm_head)
    ids = torch.tensor([[4, 2]])
    assert torch.equal(generate(model, ids, max_new_tokens=9), by_modules(model, ids, max_new_tokens=9))
    assert taken == [True] * 9


@needs_native
def test_types_and_ids_beyond_the_table_are_the_networks_to_take_or_refuse() -> None:
    model, taken = made(Int8Rows())
    types = torch.tensor([[1, 1, 2]])
    found = generate(model, torch.tensor([[1, 2, 3]]), token_type_ids=types, max_new_tokens=4)
    assert not taken and found.shape == (1, 7)
    steps, cache = DirectPass(model, True), KVCache.of(model.config, 9)
    with torch.inference_mode():
        model(torch.tensor([[1, 2]]), past_key_values=cache)
        for ids, positions in ((17, None), (-1, None), (3, 40), (3, -1)):
            at = None if positions is None else torch.tensor([[positions]])
            assert steps.logits(torch.tensor([[ids]]), cache, 1, at, None) is None and cache.length == 2
        assert steps.logits(torch.tensor([[3]]), cache, 1, torch.tensor([[39]]), None) is not None and cache.length == 3


@needs_native
def test_ids_may_be_a_part_of_others() -> None:
    model, taken = made(Int8Rows())
    ids = torch.randint(0, 17, (3, 9), generator=torch.Generator().manual_seed(0))
    for part in (ids[:, 2:5], ids.T[:4], ids[::2, ::2]):
        expected = by_modules(model, part.contiguous(), max_new_tokens=5)
        assert torch.equal(generate(model, part, max_new_tokens=5), expected)
    assert len(taken) == 15 and all(taken)


def test_a_loaded_model_has_them(tmp_path: Any) -> None:
    from neoquant.loading.load import load_model

    GPTNeoForCausalLM(make().config).init_weights(seed=0).save_pretrained(tmp_path)
    model = load_model(tmp_path, GPTNeoForCausalLM, device="cpu")
    assert model.direct_pass is DirectPass and CausalLM.direct_pass is None
