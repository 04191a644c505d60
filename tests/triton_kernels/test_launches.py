"""With Triton, a quantized layer is one launch, whatever its grid: on the simulated device, programs interpreted."""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's interpreter is off: make test-triton", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: make test-triton")

from simulated_cuda.device import Counts, simulate

from neoquant.generation import cuda_graph
from neoquant.generation.generate import stream
from neoquant.grids import Affine, Codebook, Grid, Mxfp4, make_grid
from neoquant.kernels import Bitsandbytes, Kernel, Reference, ReferenceInt8, choose
from neoquant.kernels.triton import launch
from neoquant.loading.pretrained import GPTNeoForCausalLM
from neoquant.model.config import GPTNeoConfig
from neoquant.nn import block_step as block_steps
from neoquant.nn.block_step import block_step
from neoquant.nn.linear import QuantLinear
from neoquant.quantizers import Nearest
from neoquant.tensor import QuantizedTensor
from neoquant.triton import running

WINDOW = 8
GRIDS: list[Grid] = [
    Codebook(),
    Codebook("fp4", 64, False),
    Mxfp4(),
    make_grid(8, "int8"),
    Affine(3, 32),
    Affine(4, 64),
]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name + str(grid.bits))
def test_a_layer_is_one_launch_and_two_for_many_rows(grid: Grid, gpu: Counts) -> None:
    q = Nearest().quantize(torch.randn(12, 128), grid)
    here = QuantLinear(q, torch.randn(12))
    layer = QuantLinear(q, here.bias.detach()).to("cuda")  # type: ignore[union-attr]
    assert layer.kernel.name == "triton" and layer.quantized.equals(q.to("cuda"))
    with torch.inference_mode():
        layer(torch.randn(1, 128, device="cuda"))  # tables are made once
        for rows, launches in ((1, 1), (4, 1), (64, 1), (65, 2)):
            x = torch.randn(rows, 128)
            gpu.reset()
            y = layer(x.to("cuda"))
            assert gpu.totals() == (launches, 0, 1)  # x is copied
            assert torch.allclose(y.cpu(), here(x), atol=2e-4)


def test_cards_that_triton_multiplies_no_integers_on(can_be_simulated: None) -> None:
    q, device = Nearest().quantize(torch.randn(12, 128), Codebook()), torch.device("cuda", 0)
    for capability, name in {(7, 5): "reference-int8", (8, 0): "triton-int8"}.items():
        with simulate(capability):
            assert choose(q.grid, q.shape, device, False, "int8").name == name
            assert choose(q.grid, q.shape, device, False).name == "triton"


def test_programs_run_where_their_tensors_lie(gpu: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever device is the current one."""
    layer = QuantLinear(Nearest().quantize(torch.randn(12, 128), Codebook())).to("cuda")
    x = torch.randn(1, 128, device="cuda")
    with torch.inference_mode():
        expected = layer(x)
        with torch.cuda.device(1):
            assert torch.equal(layer(x), expected) and torch.cuda.current_device() == 1
            monkeypatch.setattr(running, "run", lambda *launched: running.launch(*launched))
            with pytest.raises(RuntimeError, match="Triton launches on cuda:1"):
                layer(x)


@pytest.mark.parametrize("kernel", [Reference(), ReferenceInt8(), Bitsandbytes()], ids=lambda kernel: kernel.name)
def test_a_layer_that_moves_takes_the_fastest_kernel_there(
    kernel: Kernel, gpu: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from one that would run there as well, as a layer has where the native library does not run; not one that
    was given its kernel."""
    q = Nearest().quantize(torch.randn(12, 128), Codebook())
    here = torch.device("cpu")
    if reason := kernel.refuse(q.grid, q.shape, here):
        pytest.skip(reason)
    given = QuantLinear(q, kernel=kernel)
    with monkeypatch.context() as patch:
        patch.setattr("neoquant.nn.linear.choose", lambda *asked: kernel)
        layer = QuantLinear(q)
    assert given.to("cuda").kernel is layer.half().kernel is kernel
    there = layer.to("cuda")
    assert there.kernel.name == {"exact": "triton", "int8": "triton-int8"}[kernel.activations]
    assert there.quantized.equals(q.to("cuda"))
    back = there.to("cpu")
    assert back.kernel is choose(q.grid, q.shape, here, False, kernel.activations) and back.quantized.equals(q)


def test_an_order_costs_nothing_and_a_row_five(gpu: Counts) -> None:
    q = Nearest().quantize(torch.randn(12, 128), Affine(4, 32))
    ordered = QuantizedTensor(q.codes, q.grid, q.params, torch.randperm(128).int(), q.dtype)
    layer, x = QuantLinear(ordered).to("cuda"), torch.randn(2, 128)
    ids = torch.tensor([[3, 11]], device="cuda")
    with torch.inference_mode():
        gpu.reset()
        y = layer(x.to("cuda"))
        assert gpu.totals() == (1, 0, 1)
        assert torch.allclose(y.cpu(), QuantLinear(ordered)(x), atol=2e-4)
        gpu.reset()
        rows = layer.embedding(ids, torch.float32)
        assert gpu.totals() == (6, 0, 0)  # five assert that the ids are rows
        assert torch.equal(rows.cpu(), ordered.dequantize(torch.float32)[ids.cpu()])


LAUNCHES = {"static": 7, "growing": 20}
"""Of a block and a token: two norms, five programs; where the cache grows, what keeps and reads keys and values."""


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several rows each: to interpret one takes a while."""
    monkeypatch.setattr(launch, "few_tiles", lambda M: {"BM": running.power_of_two(M), "BN": 32, "BK": 128})


def make_model(layers: int, grid: Grid | None, **options: Any) -> GPTNeoForCausalLM:
    config = GPTNeoConfig(
        vocab_size=99, max_position_embeddings=128, hidden_size=32, num_heads=2, num_layers=layers,
        window_size=WINDOW, intermediate_size=32, attention_types=[[["global", "local"], layers // 2]], **options,
    )  # fmt: skip
    model = GPTNeoForCausalLM(config).init_weights(seed=1).eval()
    for parameter in model.parameters():  # so that logits are far apart
        if parameter.dim() == 2:
            parameter.data.mul_(6)
    for name, module in list(model.named_modules()):
        if grid is not None and isinstance(module, torch.nn.Linear) and ".h." in name:
            bias = None if module.bias is None else module.bias.detach()
            model.set_submodule(name, QuantLinear(Nearest().quantize(module.weight.detach(), grid), bias))
    for block in model.transformer.h:
        block.step = block_step
    return model


def tokens(model: GPTNeoForCausalLM, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    return torch.stack(list(stream(model, ids, max_new_tokens=14, **options)), 1).cpu()


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("grid", [Codebook("nf4", 32, True), Affine(4, 32)], ids=["nf4", "affine"])
def test_tokens_through_blocks_are_the_same(
    grid: Grid, static: bool, gpu: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rings that wrap around, buffers that grow, padding, several programs a head."""
    monkeypatch.setattr(cuda_graph, "LEAST_CAPACITY", 16)
    monkeypatch.setattr(launch, "STRETCH", 16)
    taken = []
    fast = block_steps.triton_block
    monkeypatch.setattr(block_steps, "triton_block", lambda *given: taken.append(fast(*given)) or taken[-1])
    model, ids = make_model(2, grid), torch.randint(0, 99, (2, 6), generator=torch.Generator().manual_seed(1))
    keep = torch.ones(2, 6, dtype=torch.long)
    keep[0, :3] = 0
    expected = [tokens(model, ids), tokens(model, ids, attention_mask=keep)]
    assert len(expected[0].unique()) > 7 and not torch.equal(*expected)
    model.to("cuda")
    assert torch.equal(tokens(model, ids, static_cache=static), expected[0])
    assert torch.equal(tokens(model, ids, static_cache=static, attention_mask=keep), expected[1])
    assert taken and all(y is not None for y in taken)


@pytest.mark.parametrize("cache", LAUNCHES)
def test_a_block_is_few_launches(cache: str, gpu: Counts) -> None:
    spent = []
    for layers in (2, 4):
        model = make_model(layers, Affine(4, 32)).to("cuda")
        ids = torch.zeros(1, 3, dtype=torch.long, device="cuda")
        with torch.inference_mode():
            held = model(ids, use_cache=True).past_key_values
            if cache == "static":
                steps = cuda_graph.GraphedSteps(model, held, None, None, None)
                steps._ids = ids[:, :1]
                step = steps._step
            else:
                step = functools.partial(model, ids[:, :1], past_key_values=held)
            step()
            gpu.reset()
            step()
        spent.append(gpu.totals())
    assert spent[0][1:] == spent[1][1:] == (0, 0)
    assert (spent[1][0] - spent[0][0]) / 2 <= LAUNCHES[cache]
    if cache == "static":  # embeddings, head, position: no mask, which attention does not ask for
        assert 2 * spent[0][0] - spent[1][0] <= 6


def test_what_listens_in_sees_every_layer(gpu: Counts) -> None:
    """Blocks that are hooked, trained, or hold another kind of layer go the ordinary way, to the same result."""
    ids = torch.tensor([[5, 6, 7]])
    model, seen = make_model(2, Affine(4, 32)), []
    with torch.inference_mode():
        expected = model(ids).logits
        model.to("cuda")
        whole = model(ids.to("cuda")).logits.cpu()
        hook = model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda *given: seen.append(given))
        hooked = model(ids.to("cuda")).logits.cpu()
        hook.remove()
        for layer in (model.transformer.h[0].attn.attention.v_proj, model.transformer.h[1].mlp.c_fc):
            layer.set_activations("int8")
        rounded = model(ids.to("cuda")).logits.cpu()
    assert len(seen) == 1
    for found in (whole, hooked):
        assert torch.allclose(found, expected, atol=1e-3 * float(expected.abs().max()))
    assert not torch.equal(rounded, whole)


def test_three_kinds_of_layers_are_three_launches(gpu: Counts) -> None:
    """Mixed precision."""
    ids, model = torch.tensor([[5, 6, 7]]), make_model(2, Affine(4, 32))
    attention = model.transformer.h[0].attn.attention
    attention.v_proj = QuantLinear(Nearest().quantize(torch.randn(32, 32), Affine(8, 32)))
    with torch.inference_mode():
        expected = model(ids).logits
        found = model.to("cuda")(ids.to("cuda")).logits.cpu()
    assert torch.allclose(found, expected, atol=1e-3 * float(expected.abs().max()))
