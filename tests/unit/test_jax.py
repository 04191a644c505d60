"""GPT-Neo in JAX against the torch models and transformers: logits, states, caches, generation, packed weights."""

from __future__ import annotations

import importlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_tiny_model
from safetensors.torch import load_file, save_file
from weights import make_weight

jax = pytest.importorskip("jax", reason="JAX is not installed: make test-jax")
pytest.importorskip("flax", reason="flax is not installed: make test-jax")

import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

import neoquant  # noqa: E402
from neoquant import demo, packing  # noqa: E402
from neoquant.errors import CheckpointError, ContextError, RequestError  # noqa: E402
from neoquant.generation.generate import Sampling, generate  # noqa: E402
from neoquant.grids import Affine, Codebook, legal_pairs, make_grid  # noqa: E402
from neoquant.jax import FlaxGPTNeoForCausalLM, FlaxGPTNeoModel  # noqa: E402
from neoquant.jax.weights import FlaxPacked, FlaxWeight, unpack  # noqa: E402
from neoquant.quantization.recipe import Recipe  # noqa: E402
from neoquant.quantizers import Nearest  # noqa: E402
from neoquant.tensor import QuantizedTensor  # noqa: E402

VOCABULARY, CONTEXT = 259, 32
IDS = np.random.default_rng(0).integers(0, VOCABULARY, (3, 21))
RIGHT, LEFT = np.ones((3, 21), int), np.ones((3, 21), int)
RIGHT[0, 9:] = RIGHT[1, 20:] = LEFT[1, :13] = LEFT[2, :1] = 0

# 24 columns: blocks of 64 cross rows, groups of 16 and 128 do not divide them
QUANTIZED: dict[str, dict[str, Any]] = {
    "nf4": {"bits": 4, "type": "nf4"},
    "fp4 in blocks of 32, single": {"bits": 4, "type": "fp4", "block_size": 32, "double_quant": False},
    "int8": {"bits": 8, "type": "int8"},
    "affine 3": {"bits": 3, "type": "affine", "group_size": 16},
    "affine 4, float zeros": {"bits": 4, "type": "affine", "group_size": 16, "float_zero": True},
    "affine 4, rows, symmetric": {"bits": 4, "type": "affine", "group_size": -1, "symmetric": True},
    "own, nf4 embedding": {"bits": 4, "type": "nf4", "format": "neoquant", "embeddings": "nf4"},
    "own, int8 embedding": {"bits": 2, "type": "affine", "group_size": 16, "format": "neoquant", "embeddings": "int8"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("jax") / "source")


@pytest.fixture(scope="module")
def quantized(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("quantized")

    @cache
    def make(name: str) -> Path:
        return neoquant.quantize(source, folder / name, Recipe.simple(**QUANTIZED[name])).folder

    return make


@pytest.fixture(scope="module")
def model(source: Path) -> FlaxGPTNeoForCausalLM:
    return FlaxGPTNeoForCausalLM.from_pretrained(source)


def torch_model(folder: Path) -> neoquant.GPTNeoForCausalLM:
    return neoquant.GPTNeoForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")


def assert_close(found: Any, expected: torch.Tensor, where: Any = None) -> None:
    """Within 1e-4 of the largest; `where` [B, T] leaves padding out."""
    values = expected.detach().numpy()
    at = np.ones(values.shape[:2], bool) if where is None else where.astype(bool)
    assert found.shape == values.shape
    assert np.abs(np.asarray(found) - values)[at].max() <= 1e-4 * np.abs(values[at]).max()


def test_the_logits_are_transformers_on_padded_batches(source: Path, model: FlaxGPTNeoForCausalLM) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    for mask in (None, RIGHT):
        with torch.no_grad():
            kept = None if mask is None else torch.tensor(mask)
            expected = theirs(torch.tensor(IDS), attention_mask=kept).logits
        assert_close(model(IDS, mask).logits, expected, mask)


def test_trained_weights_in_both_classes() -> None:
    """The bundled model beside transformers, one row padded on the left: beyond its local layers' window."""
    transformers = pytest.importorskip("transformers")
    folder = demo.MODEL
    ids = np.random.default_rng(1).integers(0, 1000, (2, 300))
    mask = np.ones_like(ids)
    mask[0, :40] = 0
    given = torch.tensor(ids), torch.tensor(mask)
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        position_ids = (given[1].cumsum(1) - 1).clamp(min=0)
        logits = theirs(given[0], attention_mask=given[1], position_ids=position_ids).logits
        states = theirs.transformer(given[0], attention_mask=given[1], position_ids=position_ids).last_hidden_state
    at = {"position_ids": position_ids.numpy()}
    assert_close(FlaxGPTNeoForCausalLM.from_pretrained(folder)(ids, mask, **at).logits, logits, mask)
    assert_close(FlaxGPTNeoModel.from_pretrained(folder)(ids, mask, **at).last_hidden_state, states, mask)


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_folders_give_torchs_logits_and_stay_packed(source: Path, quantized: Any, name: str) -> None:
    folder = quantized(name)
    model = FlaxGPTNeoForCausalLM.from_pretrained(folder)
    expected = torch_model(folder)(torch.tensor(IDS), torch.tensor(RIGHT)).logits
    assert_close(model(IDS, RIGHT).logits, expected, RIGHT)
    packed = jax.tree.leaves(nnx.state(model, FlaxPacked))
    assert len([array for array in packed if array.dtype == jnp.uint8 and array.ndim == 2]) >= 12
    block_weights = 2 * (4 * 24 * 24 + 2 * 24 * 96)
    assert sum(array.nbytes for array in packed) < block_weights * 4 + VOCABULARY * 24 * 2, "far from float32"
    stored = {path[-2] for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)) if "weight" in path}
    assert not [name for name in stored if name.endswith("_proj")], "codes are not trained"


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False, "dtype": "float32"},
        {"attention_types": [[["local"], 2]], "attention_layers": ["local", "local"], "window_size": 1},
        {"activation_function": "relu", "intermediate_size": 40, "layer_norm_epsilon": 1e-3, "dtype": "bfloat16"},
        {"activation_function": "gelu", "window_size": 500, "num_heads": 1},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_other_configurations(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = write_tiny_model(tmp_path / "model", **changes)
    if changes.get("tie_word_embeddings") is False:
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = torch.randn(VOCABULARY, 24, generator=torch.Generator().manual_seed(1))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    expected = torch_model(folder)(torch.tensor(IDS), torch.tensor(RIGHT)).logits
    assert_close(FlaxGPTNeoForCausalLM.from_pretrained(folder)(IDS, RIGHT).logits, expected, RIGHT)


def test_the_bare_network_gives_every_hidden_state(source: Path) -> None:
    found = FlaxGPTNeoModel.from_pretrained(source)(IDS, RIGHT, output_hidden_states=True)
    theirs = neoquant.GPTNeoModel.from_pretrained(source, dtype=torch.float32, device_map="cpu")
    expected = theirs(torch.tensor(IDS), torch.tensor(RIGHT), output_hidden_states=True)
    assert_close(found.last_hidden_state, expected.last_hidden_state, RIGHT)
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    for mine, theirs_too in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert_close(mine, theirs_too, RIGHT)


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("n", [1, 7, 8, 9, 40, 129])
def test_codes_of_every_width_are_unpacked(width: int, n: int) -> None:
    codes = torch.randint(0, 1 << width, (3, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    packed = packing.pack(codes, width)
    packed = packed if width == 8 else torch.nn.functional.pad(packed, (0, -packed.shape[1] % width))
    np.testing.assert_array_equal(unpack(jnp.asarray(packed.numpy()), width, n), codes.numpy())


@pytest.mark.parametrize("mask", [None, LEFT], ids=["", "padded"])
def test_in_pieces_with_a_cache_it_is_the_same(model: FlaxGPTNeoForCausalLM, mask: Any) -> None:
    positions = None if mask is None else np.maximum(mask.cumsum(1) - 1, 0)
    whole = np.asarray(model(IDS, mask, positions).logits)
    cache = model.init_cache(3, 24)
    for start, stop in ((0, 7), (7, 14), (14, 21)):
        at = None if positions is None else positions[:, start:stop]
        seen = None if mask is None else mask[:, :stop]
        output = model(IDS[:, start:stop], seen, at, past_key_values=cache)
        where = np.ones((3, stop - start), bool) if mask is None else mask[:, start:stop].astype(bool)
        assert np.abs(np.asarray(output.logits) - whole[:, start:stop])[where].max() < 1e-5 * np.abs(whole).max()
        assert int(cache.length) == start and int(output.past_key_values.length) == stop
        cache = output.past_key_values
    with pytest.raises(ContextError, match="25 positions; this cache has room for 24"):
        model(IDS[:, :4], past_key_values=cache)


@pytest.mark.parametrize("name", ["plain", "nf4"])
def test_generation_is_torchs_greedy(source: Path, quantized: Any, model: FlaxGPTNeoForCausalLM, name: str) -> None:
    folder = source if name == "plain" else quantized(name)
    mine = model if name == "plain" else FlaxGPTNeoForCausalLM.from_pretrained(folder)
    theirs = torch_model(folder)

    def expected(ids: Any, mask: Any, **options: Any) -> Any:
        kept = None if mask is None else torch.tensor(mask)
        sampling = Sampling(**options)
        return generate(theirs, torch.tensor(ids), attention_mask=kept, max_new_tokens=11, sampling=sampling).numpy()

    for mask in (None, LEFT, RIGHT):
        whole = expected(IDS, mask)
        assert np.array_equal(mine.generate(IDS, mask, max_new_tokens=11, eos_token_id=-1), whole)
        end = int(whole[0, 24])  # one that comes
        found = mine.generate(IDS, mask, max_new_tokens=11, eos_token_id=end, pad_token_id=7)
        assert np.array_equal(found, expected(IDS, mask, eos_token_ids=(end,), pad_token_id=7))
    alike = IDS[[0, 0, 0]]  # all rows end together, and early
    end = int(expected(alike, None)[0, 24])
    found = mine.generate(alike, max_new_tokens=11, eos_token_id=end)
    assert found.shape[1] <= 25 and np.array_equal(found, expected(alike, None, eos_token_ids=(end,)))


@pytest.mark.parametrize("pad", [VOCABULARY, 900, -1])
@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
def test_padding_outside_the_vocabulary_changes_nothing(model: FlaxGPTNeoForCausalLM, mask: Any, pad: int) -> None:
    """As in torch; also with a cache, whose room is wider than what is there."""
    padded = np.where(mask, IDS, pad)
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    expected = np.asarray(model(IDS, mask, positions).logits)
    kept = mask.astype(bool)
    assert np.array_equal(np.asarray(model(padded, mask, positions).logits)[kept], expected[kept])
    cache = model.init_cache(3, 24)
    for start, stop in ((0, 5), (5, 21)):
        output = model(padded[:, start:stop], mask[:, :stop], positions[:, start:stop], past_key_values=cache)
        cache, seen = output.past_key_values, kept[:, start:stop]
        difference = np.asarray(output.logits)[seen] - expected[:, start:stop][seen]
        assert np.abs(difference).max() < 1e-5 * np.abs(expected).max()
    whole = np.asarray(model.generate(IDS, mask, max_new_tokens=9, eos_token_id=-1))
    found = np.asarray(model.generate(padded, mask, max_new_tokens=9, eos_token_id=-1))
    assert np.array_equal(found[:, 21:], whole[:, 21:]) and np.array_equal(found[:, :21], padded)
    end = int(whole[0, 24])
    ended = np.asarray(model.generate(padded, mask, max_new_tokens=9, eos_token_id=end, pad_token_id=pad))
    stops = np.argmax(whole[0, 21:] == end)
    assert np.array_equal(ended[0, 21 : 22 + stops], whole[0, 21 : 22 + stops])
    assert (ended[0, 22 + stops :] == pad).all()


def test_sampling_is_repeatable_and_from_the_likeliest(model: FlaxGPTNeoForCausalLM) -> None:
    def draw(**options: Any) -> Any:
        return np.asarray(model.generate(IDS, max_new_tokens=11, do_sample=True, eos_token_id=-1, **options))

    assert np.array_equal(draw(seed=3), draw(seed=3)) and not np.array_equal(draw(seed=3), draw(seed=4))
    assert np.array_equal(draw(top_k=1), model.generate(IDS, max_new_tokens=11, eos_token_id=-1))
    assert model.generate(IDS, max_new_tokens=0).shape == IDS.shape


@pytest.mark.parametrize(("shape", "ordered"), [((3, 37), False), ((3, 37), True), ((4, 64), False)], ids=str)
def test_every_grid_decodes_as_it_is_defined(shape: tuple[int, int], ordered: bool) -> None:
    grids = [make_grid(bits, name) for bits, name in legal_pairs()]
    for grid in (
        *grids,
        Affine(4, 16, True),
        Affine(3, 16, float_zero=True),
        Codebook("nf4", 32),
        Codebook("fp4", 64, False),
    ):
        w = make_weight(shape, torch.float32, "normal", 1)
        q = Nearest().quantize(w, grid)
        if ordered:
            order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(2)).int()
            q = QuantizedTensor(q.codes, grid, q.params, order, q.dtype)
        graph, state = nnx.split(FlaxWeight(q, jnp.float32))
        at = jnp.array([[2, 0], [1, 2]])
        decode = jax.jit(
            lambda s, a, g=graph: (nnx.merge(g, s).rows(None, jnp.float32), nnx.merge(g, s).rows(a, jnp.float32))
        )
        whole, rows = decode(state, at)
        expected = q.dequantize(torch.float32).numpy()
        bound = 1e-6 * np.abs(expected).max()  # a compiler may fuse what is added and multiplied
        assert np.abs(np.asarray(whole) - expected).max() <= bound, grid
        assert np.abs(np.asarray(rows) - expected[np.asarray(at)]).max() <= bound, grid


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_comes_close(quantized: Any, dtype: str) -> None:
    folder = quantized("nf4")
    model = FlaxGPTNeoForCausalLM.from_pretrained(folder, dtype=dtype)
    expected = torch_model(folder)(torch.tensor(IDS)).logits.detach().numpy()
    found = model(IDS).logits
    assert str(found.dtype) == dtype == str(jnp.dtype(model.dtype))
    assert np.abs(np.asarray(found, np.float32) - expected).max() < 0.05 * np.abs(expected).max()


def test_inside_somebody_elses_jit_and_grad(model: FlaxGPTNeoForCausalLM) -> None:
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def loss(params: Any, ids: Any) -> Any:
        logits = nnx.merge(graph, params, rest)(ids).logits
        return -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], -1).mean()

    slope = jax.grad(loss)(params, jnp.asarray(IDS))
    assert all(bool(jnp.isfinite(array).all()) for array in jax.tree.leaves(slope))
    assert float(loss(params, jnp.asarray(IDS))) > 0


def test_what_cannot_be_is_refused(source: Path, model: FlaxGPTNeoForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(ContextError, match="33 positions; this model has 32"):
        model(np.zeros((1, 33), int))
    with pytest.raises(ContextError, match="33 positions; this model has 32"):
        model.init_cache(1, 33)
    with pytest.raises(ContextError, match="21 tokens of prompt and 12 new; this model's context is 32"):
        model.generate(IDS, max_new_tokens=12)
    for ids in ([[3, 259]], [[-1, 3]]):
        with pytest.raises(RequestError, match="input_ids are 0 to 258, got"):
            model(np.array(ids))
        with pytest.raises(RequestError, match="input_ids are 0 to 258, got"):
            model.generate(np.array(ids))
    with pytest.raises(RequestError, match="position_ids are 0 to 31, got 0 to 32"):
        model(np.array([[1, 2]]), position_ids=np.array([[0, 32]]))
    with pytest.raises(RequestError, match="attention_mask covers 20 positions; there are 21"):
        model(IDS, RIGHT[:, :20])
    with pytest.raises(RequestError, match=r"attention_mask is \[3, 20\], but input_ids is \[3, 21\]"):
        model.generate(IDS, RIGHT[:, :20], max_new_tokens=1)
    with pytest.raises(RequestError, match="leaves a row no token"):
        model.generate(IDS, RIGHT * 0, max_new_tokens=1)
    for options, message in (({"temperature": 0.0}, "temperature is 0.0"), ({"top_k": -1}, "top_k is -1")):
        with pytest.raises(RequestError, match=message):
            model.generate(IDS, max_new_tokens=1, do_sample=True, **options)
    with pytest.raises(RequestError, match="the prompt is empty"):
        model.generate(np.zeros((1, 0), int), max_new_tokens=1)
    with pytest.raises(RequestError, match="dtype is 'int8'; legal are float32, float16, bfloat16"):
        FlaxGPTNeoForCausalLM.from_pretrained(source, dtype="int8")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_neo"}))
    with pytest.raises(CheckpointError, match="holds no weights"):
        FlaxGPTNeoForCausalLM.from_pretrained(tmp_path)


def test_without_jax_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import neoquant.jax

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "flax" else object())
    with pytest.raises(RequestError, match=r"needs flax: pip install 'neoquant\[jax\]'"):
        importlib.reload(neoquant.jax)
