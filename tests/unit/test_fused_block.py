"""Positions through a block in one call: as the block itself does it, and left alone where it would differ."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from switch import every_isa, forced
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from neoquant import native
from neoquant.grids import Affine, Codebook, Grid, Int8Rows, TrellisGrid
from neoquant.kernels import Kernel, Reference
from neoquant.loading.pretrained import GPTNeoModel
from neoquant.model.cache import KVCache
from neoquant.model.config import GPTNeoConfig
from neoquant.model.gpt_neo import AttentionMasks
from neoquant.native.step import rows_alike
from neoquant.nn.fused_block import fused_block
from neoquant.nn.linear import QuantLinear, StoredLinear
from neoquant.quantizers import Nearest

GRIDS = [
    Codebook(),
    Codebook("fp4", 128, False),
    Int8Rows(),
    Affine(4, 64),
    Affine(3, 16, True),
    Affine(2, 32),
    Affine(8),
    TrellisGrid(16),
    TrellisGrid(16, 3),
]
LINEARS = [f"attn.attention.{name}_proj" for name in ("q", "k", "v", "out")] + ["mlp.c_fc", "mlp.c_proj"]
needs_native = pytest.mark.skipif(native.active().library is None, reason=native.active().reason)


def make(grid: Grid = GRIDS[0], kernel: Kernel | None = None, stepping: bool = True, **asked: Any) -> GPTNeoModel:
    """A network of two blocks, one of them local, with quantized layers."""
    values = {"hidden_size": 40, "num_heads": 2, "intermediate_size": 72, "window_size": 3, "seed": 0} | asked
    seed, context = values.pop("seed"), values.pop("context", 40)
    config = GPTNeoConfig(
        vocab_size=17,
        max_position_embeddings=context,
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
        **values,
    )
    model = GPTNeoModel(config).init_weights(seed=seed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4).add_(0.05 * torch.randn(parameter.shape))
    for block in model.h:
        for name in LINEARS:
            linear = block.get_submodule(name)
            q = Nearest().quantize(linear.weight.detach(), grid)
            bias = None if linear.bias is None else linear.bias.detach()
            block.set_submodule(name, QuantLinear(q, bias, kernel))
        block.step = fused_block if stepping else None
    return model


def twin(model: GPTNeoModel, dtype: torch.dtype = torch.float64) -> GPTNeoModel:
    """The same values in plain torch, without steps."""
    plain = copy.deepcopy(model).to(dtype)
    for block in plain.h:
        for name in LINEARS:
            layer = block.get_submodule(name)
            block.set_submodule(name, QuantLinear(layer.quantized, layer.bias, Reference()))
        block.step = None
    return plain


def generate(
    model: GPTNeoModel, ids: Tensor, prompt: int, keep: Tensor | None = None, at_once: int = 1,
    storage: str | None = None,
) -> tuple[Tensor, KVCache]:  # fmt: skip
    """Hidden states of ids[B, T], of which the first are read at once and the others one by one, or so many."""
    cache, seen = KVCache.of(model.config, 3, storage), []
    positions = None if keep is None else (keep.cumsum(1) - 1).clamp(min=0)
    behind = [(i, i + at_once) for i in range(prompt, ids.shape[1], at_once)]
    for begin, end in [(0, prompt), *behind] if prompt else behind:
        mask, at = (None, None) if keep is None else (keep[:, :end], positions[:, begin:end])
        out = model(ids[:, begin:end], mask, position_ids=at, past_key_values=cache)
        seen.append(out.last_hidden_state)
    return torch.cat(seen, 1), cache


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each block that was asked took the step."""
    taken: list[bool] = []
    real = fused_block

    def told(*arguments: Any) -> Tensor | None:
        y = real(*arguments)
        taken.append(y is not None)
        return y

    monkeypatch.setitem(globals(), "fused_block", told)
    return taken


@every_isa
@pytest.mark.parametrize("threads", [1, 3])
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_steps_are_what_the_block_does(isa: str, threads: int, data: st.DataObject) -> None:
    heads, size = data.draw(st.sampled_from([1, 3])), data.draw(st.sampled_from([5, 8, 13, 16, 40]))
    model = make(
        data.draw(st.sampled_from(GRIDS)), seed=data.draw(st.integers(0, 99)),
        num_heads=heads, hidden_size=heads * size,
        intermediate_size=data.draw(st.sampled_from([8, 50, 96])), window_size=data.draw(st.integers(1, 12)),
        activation_function=data.draw(st.sampled_from(["gelu_new", "gelu_pytorch_tanh", "relu"])),
    )  # fmt: skip
    rows = data.draw(st.sampled_from([1, 2, 5, 9]))
    ids = torch.randint(0, 17, (rows, 12), generator=torch.Generator().manual_seed(rows))
    keep = torch.arange(12) >= torch.arange(rows)[:, None] if data.draw(st.booleans()) else None
    with forced(isa, threads), torch.inference_mode():
        found, cache = generate(model, ids, 4, keep)
    with torch.inference_mode():
        expected, held = generate(twin(model), ids, 4, keep)
        plain, _ = generate(twin(model, torch.float32), ids, 4, keep)
    kept = torch.ones(rows, 12, dtype=torch.bool) if keep is None else keep
    assert_as_exact(found[kept], plain[kept], expected[kept])
    assert cache.length == held.length == 12


@every_isa
@pytest.mark.parametrize("storage", ["float16", "int8"])
@settings(deadline=None, max_examples=4)
@given(data=st.data())
def test_what_is_held_in_fewer_bits_is_what_torch_holds(isa: str, storage: str, data: st.DataObject) -> None:
    """And gives what it gives there, for one position, a few and many, in buffers that slide; alone and padded."""
    heads, size = data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from([3, 8, 13, 40, 144]))
    model = make(
        seed=data.draw(st.integers(0, 99)), num_heads=heads, hidden_size=heads * size, context=600,
        window_size=data.draw(st.sampled_from([1, 5, 40])),
    )  # fmt: skip
    rows, at_once, prompt = data.draw(st.sampled_from([(1, 1, 150), (2, 1, 40), (3, 5, 7), (2, 37, 300)]))
    length = prompt + 2 * at_once + (70 if at_once == 1 else 0)
    ids = torch.randint(0, 17, (rows, length), generator=torch.Generator().manual_seed(rows))
    keep = torch.arange(length) >= 3 * torch.arange(rows)[:, None] if data.draw(st.booleans()) else None
    plain = twin(model, torch.float32)
    with forced(isa), torch.inference_mode():
        found, cache = generate(model, ids, prompt, keep, at_once, storage)
    with torch.inference_mode():
        expected, held = generate(plain, ids, prompt, keep, at_once, storage)
        exact, _ = generate(twin(model), ids, prompt, keep, at_once)
    kept = torch.ones(rows, length, dtype=torch.bool) if keep is None else keep
    assert cache.nbytes == held.nbytes
    # What is rounded to the one side here and to the other there is as far apart as what is rounded at all.
    usual = (expected - exact)[kept].norm()
    assert (found - expected)[kept].norm() <= 0.5 * usual + 1e-4 * exact[kept].norm()


def assert_as_exact(found: Tensor, plain: Tensor, expected: Tensor) -> None:
    """Within a few times what torch's float32 loses of float64: scores are large, and may lose much."""
    usual = (plain.double() - expected).abs().max()
    assert (found.double() - expected).abs().max() <= 16 * usual + 1e-4 * expected.abs().max()


@every_isa
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_many_positions_are_what_the_block_does(isa: str, data: st.DataObject) -> None:
    """Around the sizes of panels and pieces, behind positions that are held, without a cache, with padding anywhere."""
    heads, size = data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from([3, 8, 13, 24]))
    rows, held = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.sampled_from([0, 1, 33]))
    new = data.draw(st.sampled_from([2, 5, 31, 33, 64, 90, 250, 500]))
    model = make(
        data.draw(st.sampled_from(GRIDS)), seed=data.draw(st.integers(0, 99)), context=600,
        num_heads=heads, hidden_size=heads * size, intermediate_size=24,
        window_size=data.draw(st.sampled_from([1, 7, 32, 200, 1000])),
        activation_function=data.draw(st.sampled_from(["gelu_new", "relu"])),
    )  # fmt: skip
    random = torch.Generator().manual_seed(new + rows)
    ids = torch.randint(0, 17, (rows, held + new), generator=random)
    keep = torch.rand(ids.shape, generator=random) < 0.8 if data.draw(st.booleans()) else None
    cached = held > 0 or data.draw(st.booleans())

    def read(network: GPTNeoModel) -> Tensor:
        if cached:
            return generate(network, ids, held, keep, at_once=new)[0]
        positions = None if keep is None else (keep.cumsum(1) - 1).clamp(min=0)
        return network(ids, keep, position_ids=positions).last_hidden_state

    with forced(isa, data.draw(st.sampled_from([1, 3]))), torch.inference_mode():
        found = read(model)
    with torch.inference_mode():
        expected, plain = read(twin(model)), read(twin(model, torch.float32))
    assert_as_exact(found, plain, expected)


@needs_native
@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize("padding", ["none", "one for all", "left", "everywhere"])
@pytest.mark.parametrize(("rows", "new"), [(3, 161), (2, 241), (1, 481), (482, 1), (161, 3)])
def test_sequences_across_the_border_of_a_piece(
    rows: int, new: int, padding: str, activations: str, steps: list[bool]
) -> None:
    """480 rows go through a block together: a sequence may be cut, and its last positions come by themselves."""
    model = make(Affine(4, 16), context=600, window_size=70)
    ids = torch.randint(0, 17, (rows, 2 + new), generator=torch.Generator().manual_seed(new))
    keep = {
        "none": None,
        "one for all": (torch.arange(2 + new) >= 1)[None],
        "left": torch.arange(2 + new) >= torch.arange(rows)[:, None] % (2 + new),
        "everywhere": torch.zeros(rows, 2 + new, dtype=torch.bool),
    }[padding]
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.set_activations(activations)
    with torch.inference_mode():
        found, _ = generate(model, ids, 2, keep, at_once=new)
        assert steps == [True] * 4
        for block in model.h:
            block.step = None
        ordinary, _ = generate(model, ids, 2, keep, at_once=new)
        if activations == "exact":
            assert_as_exact(found, ordinary, generate(twin(model), ids, 2, keep, at_once=new)[0])
        else:  # a rounding that falls the other way is a whole step
            assert (found - ordinary).square().mean().sqrt() < 2e-2 * ordinary.square().mean().sqrt()


@needs_native
@pytest.mark.parametrize("place", [0, 40])
def test_what_is_not_a_number_is_seen(place: int) -> None:
    """By those who look at it, and never by those of an earlier panel; zero times it is not a number either."""
    model = make(context=100, window_size=100)
    with torch.inference_mode():
        x = model.wte(torch.randint(0, 17, (1, 60)))
        x[0, place] = torch.nan
        masks = AttentionMasks(60, 60, 100, None, x.device)
        y = fused_block(model.h[0], x, masks, None)
    assert y is not None
    assert y[:, : place // 32 * 32].isfinite().all() and not y[:, place:].isfinite().any()


@needs_native
@pytest.mark.parametrize("held", [0, 2])
def test_masks_of_something_else_are_left_to_the_block(held: int) -> None:
    model = make()
    with torch.inference_mode():
        cache = generate(model, torch.arange(held)[None].expand(2, -1), held)[1] if held else None
        x = torch.randn(2, 6, 40)
        for T, S, keep in [
            (6, held + 6, torch.ones(2, 3, dtype=torch.bool)),
            (6, held + 6, torch.ones(3, held + 6, dtype=torch.bool)),
            (6, held + 6, torch.ones(2, held + 6)),
            (6, held + 9, None),
            (5, held + 6, None),
        ]:
            assert fused_block(model.h[0], x, AttentionMasks(T, S, 3, keep, x.device), cache) is None
        assert fused_block(model.h[0], x, AttentionMasks(6, held + 6, 3, None, x.device), cache) is not None


def plain() -> GPTNeoModel:
    """Without a quantized layer: torch does everything that the library does."""
    model = make(stepping=False)
    for block in model.h:
        for name in LINEARS:
            layer = block.get_submodule(name)
            linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            linear.weight.data = layer.quantized.dequantize(torch.float32)
            if layer.bias is not None:
                linear.bias.data = layer.bias.data
            block.set_submodule(name, linear)
        block.step = fused_block
    return model.eval()


@needs_native
def test_another_activation_is_computed(steps: list[bool]) -> None:
    """It was put in the place of GPT-Neo's own, after the block had been described."""
    model, x = make(), torch.randn(1, 5, 40)
    masks = AttentionMasks(5, 5, 3, None, x.device)
    with torch.no_grad():
        before = model.h[0](x, masks)
        model.h[0].mlp.act = torch.nn.Tanh()
        found = model.h[0](x, masks)
        assert steps == [True, False] and model.h[0].mlp.activation is None
        model.h[0].step = None
        assert torch.equal(found, model.h[0](x, masks)) and not torch.allclose(found, before)
    other = make(activation_function="relu")
    assert other.h[0].mlp.activation == "relu" and copy.deepcopy(other).h[0].mlp.activation == "relu"


@needs_native
def test_who_takes_over_torchs_operations_gets_them(steps: list[bool]) -> None:
    model, x = plain(), torch.randn(1, 5, 40)

    def run(x: Tensor) -> Tensor:
        return model.h[0](x, AttentionMasks(5, 5, 3, None, x.device))

    with torch.no_grad():
        expected = run(x)
        assert steps == [True]
        steps.clear()
        with FlopCounterMode(display=False) as counter:
            run(x)
        assert counter.get_total_flops() >= 2 * 5 * 40 * (4 * 40 + 2 * 72)
        graph = make_fx(run)(torch.zeros(1, 5, 40))
        assert torch.allclose(graph(x), expected, rtol=1e-4, atol=1e-4)
        assert torch.allclose(torch.vmap(run)(x[None])[0], expected, rtol=1e-4, atol=1e-4)
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            assert run(fake.from_tensor(x)).shape == (1, 5, 40)
    assert steps and not any(steps)


@needs_native
def test_many_rows_of_plain_layers_are_multiplied_by_whoever_is_faster(steps: list[bool]) -> None:
    model, x = plain(), torch.randn(1, 30, 40)
    for isa, taken in (
        ("portable", [False]),
        (native.runnable()[-1], [native.runnable()[-1] in ("avx512", "avx512vnni", "amx")]),
    ):
        steps.clear()
        with forced(isa), torch.inference_mode():
            model.h[0](x, AttentionMasks(30, 30, 3, None, x.device))
        assert steps == taken


@every_isa
@pytest.mark.parametrize("stepping", [True, False])
def test_a_step_is_taken(isa: str, stepping: bool, steps: list[bool]) -> None:
    with forced(isa), torch.inference_mode():
        model = make(stepping=False)
        for block in model.h:
            block.step = fused_block if stepping else None
        generate(model, torch.arange(8)[None], 5)
    assert steps == [True] * 8 * stepping  # of the prompt and three positions, in two blocks


def change_type(model: GPTNeoModel) -> None:
    model.bfloat16()


def train(model: GPTNeoModel) -> None:
    model.train()


def listen(model: GPTNeoModel) -> None:
    for block in model.h:
        block.mlp.c_fc.register_forward_hook(lambda *arguments: None)


class Adapted(torch.nn.Linear):
    """Somebody's own layer."""


def replace(model: GPTNeoModel) -> None:
    for block in model.h:
        block.mlp.c_fc = Adapted(40, 72)


def other_kernel(model: GPTNeoModel) -> None:
    for block in model.h:
        block.attn.attention.q_proj._take(Reference())


def ordered(model: GPTNeoModel) -> None:
    for block in model.h:
        block.mlp.c_fc.register_buffer("order", torch.arange(40).flip(0))


def train_a_part(model: GPTNeoModel) -> None:
    for block in model.h:
        block.mlp.train()


def patch(model: GPTNeoModel) -> None:
    for block in model.h:
        block.mlp.forward = lambda x: x


@pytest.mark.parametrize("change", [change_type, train, train_a_part, listen, replace, patch, other_kernel, ordered])
def test_what_a_step_does_not_do_goes_the_ordinary_way(
    change: Callable[[GPTNeoModel], None], steps: list[bool]
) -> None:
    model = make()
    change(model)
    with torch.inference_mode():
        found, _ = generate(model, torch.arange(8)[None], 5)
        for block in model.h:
            block.step = None
        expected, _ = generate(model, torch.arange(8)[None], 5)
    assert not any(steps) and torch.equal(found, expected)


@pytest.mark.parametrize("asked", [{"activation_function": "silu"}, {"window_size": 3}], ids=["silu", "gradients"])
def test_unknown_activations_and_gradients(asked: dict[str, Any], steps: list[bool]) -> None:
    model = make(**asked)
    with torch.inference_mode("activation_function" in asked):
        found, _ = generate(model, torch.arange(8)[None], 5)
    assert not any(steps)
    assert found.requires_grad == ("window_size" in asked)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_layers_take_part(dtype: torch.dtype, steps: list[bool]) -> None:
    model = make()
    for block in model.h:
        layer = block.mlp.c_fc
        weight = torch.nn.Parameter(layer.quantized.dequantize(dtype))
        block.mlp.c_fc = StoredLinear(weight, layer.bias)
    with torch.inference_mode():
        found, _ = generate(model, torch.arange(8)[None], 5)
        for block in model.h:
            block.step = None
        expected, _ = generate(model, torch.arange(8)[None], 5)
    assert steps and all(steps) and torch.allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_every_implementation_but_sdpa_stays_itself(steps: list[bool]) -> None:
    model = make()
    for block in model.h:
        block.attn.attention.implementation = "eager"
        block.attn.attention.attend = block.attn.attention._eager
    with torch.inference_mode():
        generate(model, torch.arange(8)[None], 5)
    assert steps and not any(steps)


@needs_native
def test_whole_numbers_for_activations(steps: list[bool]) -> None:
    """Rounding activations must not be lost on the way."""
    model = make(Affine(4, 16))
    with torch.inference_mode():
        exact, _ = generate(model, torch.arange(8)[None], 5)
        for module in model.modules():
            if isinstance(module, QuantLinear):
                module.set_activations("int8")
        rounded, _ = generate(model, torch.arange(8)[None], 5)
        for block in model.h:
            block.step = None
        expected, _ = generate(model, torch.arange(8)[None], 5)
    assert all(steps) and not torch.equal(rounded, exact)
    assert torch.allclose(rounded, expected, rtol=1e-3, atol=1e-3)


@needs_native
@pytest.mark.parametrize("change", [train, train_a_part, listen, replace, patch, other_kernel, ordered])
def test_a_change_between_two_steps_is_seen(change: Callable[[GPTNeoModel], None], steps: list[bool]) -> None:
    model = make()
    with torch.inference_mode():
        generate(model, torch.arange(8)[None], 5)
        assert steps and all(steps)
        steps.clear()
        change(model)
        generate(model, torch.arange(8)[None], 5)
    assert steps and not any(steps)


@needs_native
def test_weights_may_move_and_models_be_copied(steps: list[bool]) -> None:
    """Nothing is remembered of where the weights lay."""
    model = make()
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        expected, _ = generate(model, ids, 5)
        other = copy.deepcopy(model)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.clone()
        assert torch.equal(generate(model, ids, 5)[0], expected)
        with torch.no_grad():
            other.h[0].ln_1.weight.data = other.h[0].ln_1.weight * 2  # the same parameter in another place
        assert not torch.equal(generate(other, ids, 5)[0], expected)
        assert torch.equal(generate(model, ids, 5)[0], expected)
    assert all(steps)


def test_models_may_be_pickled() -> None:
    """Before and behind steps; addresses stay out of it."""
    model, ids = make(), torch.arange(8)[None]
    with torch.inference_mode():
        expected, _ = generate(model, ids, 5)
        again = pickle.loads(pickle.dumps(model))
        del model
        assert torch.equal(generate(again, ids, 5)[0], expected)


def other_batch(model: GPTNeoModel, cache: KVCache) -> Tensor:
    return torch.tensor([[1], [2]])


def other_type(model: GPTNeoModel, cache: KVCache) -> Tensor:
    for layer in cache._layers:
        for stored in layer.stored:
            stored.data = stored.data.bfloat16()
    return torch.tensor([[1]])


@needs_native
@pytest.mark.parametrize("spoil", [other_batch, other_type])
def test_a_cache_of_something_else_is_not_written_to(
    spoil: Callable[[GPTNeoModel, KVCache], Tensor], steps: list[bool]
) -> None:
    model = make()
    with torch.inference_mode():
        cache = generate(model, torch.arange(5)[None], 5)[1]
        steps.clear()
        ids = spoil(model, cache)
        with contextlib.suppress(RuntimeError):  # what torch says of it
            model(ids, past_key_values=cache)
    assert steps and not any(steps)


@needs_native
def test_autocast_and_pruned_heads_go_the_ordinary_way(steps: list[bool]) -> None:
    model = make(stepping=True)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        generate(model, torch.arange(8)[None], 5)
    for block in model.h:
        block.mlp.c_fc = torch.nn.Linear(40, 24)
    with torch.inference_mode(), pytest.raises(RuntimeError):
        generate(model, torch.arange(8)[None], 7)
    assert not any(steps)


@needs_native
def test_a_bias_that_comes_later_is_seen(steps: list[bool]) -> None:
    model, ids = make(), torch.arange(8)[None]
    with torch.inference_mode():
        before, _ = generate(model, ids, 5)
        for block in model.h:
            block.attn.attention.q_proj.bias = torch.nn.Parameter(torch.ones(40))
        after, _ = generate(model, ids, 5)
        for block in model.h:
            block.step = None
        expected, _ = generate(model, ids, 5)
    assert all(steps) and not torch.equal(before, after)
    assert torch.allclose(after, expected, rtol=1e-3, atol=1e-3)


@needs_native
def test_whoever_listens_to_all_modules_is_heard(steps: list[bool]) -> None:
    model = make()
    heard: list[str] = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: heard.append(type(module).__name__)
    )
    try:
        with torch.inference_mode():
            model(torch.arange(8)[None])
    finally:
        handle.remove()
    assert not any(steps) and heard.count("QuantLinear") == 12


@every_isa
@pytest.mark.parametrize("storage", [None, "float16", "int8"])
@pytest.mark.parametrize("grid", [GRIDS[0], GRIDS[3]], ids=str)
def test_a_few_positions_get_the_bits_that_each_gets_alone(isa: str, grid: Grid, storage: str | None) -> None:
    """So guesses that are checked together leave a greedy text as it is."""
    model = make(grid, num_heads=1, window_size=6)
    ids = torch.randint(0, 17, (1, 29), generator=torch.Generator().manual_seed(3))
    with forced(isa), torch.inference_mode():
        alone, _ = generate(model, ids, 5, None, 1, storage)
        assert rows_alike() >= 4
        for together in range(2, rows_alike() + 1):
            length = 5 + 24 // together * together
            found, _ = generate(model, ids[:, :length], 5, None, together, storage)
            assert torch.equal(found, alone[:, :length])
