"""Names that training code leaves in a state dict, and heads stored in every way: the model is the same."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_CONFIG, tiny_shapes
from safetensors.torch import load_file, save_file

import neoquant
from neoquant import GPTNeoForCausalLM, GPTNeoModel, LoadWarning
from neoquant.checkpoint import open_checkpoint
from neoquant.errors import CheckpointError
from neoquant.model.config import GPTNeoConfig
from neoquant.model.gpt_neo import CausalLM
from neoquant.model.names import EMBEDDING, TIED_HEAD
from neoquant.model.shapes import head_shapes, network_shapes

MakeModel = Callable[..., Path]
State = dict[str, torch.Tensor]
IDS = torch.arange(1, 9)[None]
NF4 = neoquant.Recipe.simple(4, "nf4")


def part(name: str) -> Callable[[str], str]:
    """A word in the middle of the names inside blocks."""
    return lambda tensor: tensor.replace(".attn.", f".{name}.attn.").replace(".mlp.", f".{name}.mlp.")


WRAPPERS: dict[str, Callable[[str], str]] = {
    "module.": lambda name: f"module.{name}",
    "_orig_mod": lambda name: f"_orig_mod.{name}",
    "_orig_mod inside": part("_orig_mod"),
    "_fsdp_wrapped_module": part("_fsdp_wrapped_module"),
    "_checkpoint_wrapped_module": part("_checkpoint_wrapped_module"),
    "model.": lambda name: f"model.{name}",
    "_forward_module.": lambda name: f"_forward_module.{name}",
    "module. and _orig_mod": lambda name: f"module._orig_mod.{name}",
    "_orig_mod and module.": lambda name: f"_orig_mod.module.{name}",
    "base_model.model.": lambda name: f"base_model.model.{name}",
    "net.decoder.": lambda name: f"net.decoder.{name}",
    "transformer.": lambda name: f"transformer.{name}",
    "module. and gpt_neo.": lambda name: f"module.gpt_neo.{name}",
}


def rewrite(folder: Path, state: State, kind: str, **config: Any) -> None:
    """Put `state` in place of the folder's weights."""
    (folder / "model.safetensors").unlink()
    if kind == "safetensors":
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "bin")
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))


def logits(folder: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoadWarning)
        return GPTNeoForCausalLM.from_pretrained(folder, dtype="float32", device_map="cpu")(IDS).logits.detach()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_names(make_model: MakeModel, wrapper: str, kind: str) -> None:
    folder = make_model()
    expected, state = logits(folder), load_file(folder / "model.safetensors")
    rewrite(folder, {WRAPPERS[wrapper](name): tensor for name, tensor in state.items()}, kind)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.headers.keys() == state.keys()
        assert all(word in " ".join(checkpoint.notes) for word in wrapper.replace(" inside", "").split(" and "))
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in state.items())
    with pytest.warns(LoadWarning, match="is left out of the tensors' names"):
        GPTNeoForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(folder), expected)


def test_two_tensors_of_one_name_are_refused(make_model: MakeModel) -> None:
    folder = make_model()
    state = load_file(folder / "model.safetensors")
    rewrite(folder, state | {f"_orig_mod.{EMBEDDING}": state[EMBEDDING].clone()}, "safetensors")
    with pytest.raises(CheckpointError, match=rf"{folder}: tensor .* and another one are both '{EMBEDDING}'"):
        open_checkpoint(folder)


def test_an_adapter_that_is_not_merged_is_named(make_model: MakeModel) -> None:
    folder = make_model()
    state = load_file(folder / "model.safetensors")
    layer = "transformer.h.1.attn.attention.q_proj"
    state[f"{layer}.base_layer.weight"] = state.pop(f"{layer}.weight")
    state |= {
        f"{layer}.lora_A.default.weight": torch.zeros(2, 24),
        f"{layer}.lora_B.default.weight": torch.zeros(24, 2),
    }
    rewrite(folder, {f"base_model.model.{name}": tensor for name, tensor in state.items()}, "safetensors")
    with pytest.raises(CheckpointError, match=rf"{layer}\.base_layer\.weight' has an adapter .*merge_and_unload"):
        open_checkpoint(folder)


@pytest.mark.parametrize("prefix", ["pretrained_model.", "model.actor."])
@pytest.mark.parametrize("base", [False, True])
def test_a_wrapper_with_tensors_of_its_own(make_model: MakeModel, prefix: str, base: bool) -> None:
    """As a model with a value head is stored by those who train it."""
    folder = make_model()
    expected, state = logits(folder), load_file(folder / "model.safetensors")
    named = {name.removeprefix("transformer.") if base else name: tensor for name, tensor in state.items()}
    head = {"v_head.summary.weight": torch.ones(1, 24)}
    rewrite(folder, {f"{prefix}{name}": tensor for name, tensor in named.items()} | head, "safetensors")
    with pytest.warns(LoadWarning, match=rf"{prefix} is left out|also holds .*v_head\.summary\.weight, which"):
        GPTNeoForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(folder), expected)
    rewrite(
        folder, {f"{which}.{name}": t.clone() for which in ("new", "old") for name, t in named.items()}, "safetensors"
    )
    with pytest.raises(CheckpointError, match=r"holds several networks, new\. and old\.: save the one that is meant"):
        open_checkpoint(folder)


def test_what_stands_before_some_names_only_is_no_wrapper(make_model: MakeModel) -> None:
    """Half of a model under another name is half of a model: it is not put together with the other."""
    folder = make_model()
    state = load_file(folder / "model.safetensors")
    rewrite(folder, {f"net.{n}" if ".h.1." in n else n: t for n, t in state.items()}, "safetensors")
    with pytest.raises(CheckpointError):
        GPTNeoForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["bin", "legacy"])
@pytest.mark.parametrize(
    ("key", "beside"),
    [
        ("state_dict", {"epoch": 3}),
        ("model", {"optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": []}, "args": [1, 2]}),
        ("weights", {"step": 7}),
        ("model", {"ema": {"decay": torch.ones(1)}}),
    ],
)
def test_state_dicts_inside_others(make_model: MakeModel, key: str, beside: State, kind: str) -> None:
    folder = make_model()
    expected, state = logits(folder), load_file(folder / "model.safetensors")
    rewrite(folder, {**beside, key: state}, kind)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.notes == (f"the tensors stand under {key!r}; what is beside them is left out",)
    assert torch.equal(logits(folder), expected)


def test_several_state_dicts_are_refused_by_key(make_model: MakeModel) -> None:
    folder = make_model()
    state = load_file(folder / "model.safetensors")
    rewrite(folder, {"generator": state, "critic": state}, "bin")  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match="holds tensors under 'generator' and 'critic': save the ones"):
        open_checkpoint(folder)


# How a tied head may be stored: the names of the tensors, and which of the two comes first.
TIED_STORAGE: dict[str, Callable[[State], State]] = {
    "embedding alone": lambda state: state,
    "head alone": lambda state: {TIED_HEAD if name == EMBEDDING else name: t for name, t in state.items()},
    "shared, embedding first": lambda state: {**state, TIED_HEAD: state[EMBEDDING]},
    "shared, head first": lambda state: {TIED_HEAD: state[EMBEDDING], **state},
    "a copy": lambda state: {TIED_HEAD: state[EMBEDDING].clone(), **state},
}


@pytest.mark.parametrize("tie", [True, None, "absent"], ids=str)
@pytest.mark.parametrize(
    ("storage", "kind"),
    [
        (storage, kind)
        for storage in TIED_STORAGE
        for kind in ("safetensors", "bin", "legacy")
        if kind != "safetensors" or not storage.startswith("shared")  # which safetensors does not hold
    ],
)
def test_a_tied_head_however_it_is_stored(
    make_model: MakeModel, tmp_path: Path, storage: str, tie: Any, kind: str
) -> None:
    folder = make_model()
    expected, state = logits(folder), load_file(folder / "model.safetensors")
    rewrite(folder, TIED_STORAGE[storage](state), kind, tie_word_embeddings=tie)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = GPTNeoForCausalLM.from_pretrained(folder, dtype="float32", device_map="cpu")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(neoquant.load(folder)[0].state_dict()[EMBEDDING], model.state_dict()[EMBEDDING])
    made = neoquant.quantize(folder, tmp_path / "out", NF4)
    assert not any("mask" in note for note in made.plan.notes)
    names = load_file(made.folder / "model.safetensors").keys()
    assert EMBEDDING in names and TIED_HEAD not in names
    plain = neoquant.convert(folder, tmp_path / "plain", "safetensors")
    assert load_file(plain.folder / "model.safetensors").keys() == state.keys()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("tie", [True, "absent"], ids=str)
def test_another_head_is_kept(make_model: MakeModel, tmp_path: Path, tie: Any, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    folder = make_model(tie_word_embeddings=False)
    state = load_file(folder / "model.safetensors")
    rewrite(folder, state, kind, tie_word_embeddings=tie)
    with pytest.warns(LoadWarning, match=r"lm_head\.weight differs from transformer\.wte\.weight, though config\.json"):
        model = GPTNeoForCausalLM.from_pretrained(folder, dtype="float32", device_map="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config.tie_word_embeddings is False and model.lm_head.weight is not model.transformer.wte.weight
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, theirs(IDS).logits, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    made = neoquant.quantize(folder, tmp_path / "out", NF4)
    plain = neoquant.convert(folder, tmp_path / "plain", "safetensors")
    for out in (tmp_path / "saved", made.folder, plain.folder):
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
        stored = load_file(out / "model.safetensors")
        assert torch.equal(stored[TIED_HEAD].float(), state[TIED_HEAD].float())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            GPTNeoForCausalLM.from_pretrained(out)
    assert any(note.startswith("lm_head.weight differs") for note in (*plain.notes,))
    assert any(note.startswith("lm_head.weight differs") for note in made.plan.notes)


def test_another_head_in_jax(make_model: MakeModel) -> None:
    pytest.importorskip("flax")
    from neoquant.jax import FlaxGPTNeoForCausalLM

    folder = make_model(tie_word_embeddings=False)
    rewrite(folder, load_file(folder / "model.safetensors"), "safetensors", tie_word_embeddings=True)
    with pytest.warns(LoadWarning, match=r"lm_head\.weight differs"):
        found = FlaxGPTNeoForCausalLM.from_pretrained(folder, dtype="float32")(IDS.numpy()).logits
    assert torch.allclose(torch.tensor(np.asarray(found)), logits(folder), atol=1e-4)


def test_a_head_alone_serves_the_base_class(make_model: MakeModel) -> None:
    folder = make_model()
    state = load_file(folder / "model.safetensors")
    expected = GPTNeoModel.from_pretrained(folder)(IDS).last_hidden_state
    rewrite(folder, TIED_STORAGE["head alone"](state), "safetensors")
    assert torch.equal(GPTNeoModel.from_pretrained(folder)(IDS).last_hidden_state, expected)


def test_a_tied_head_that_only_the_index_lists(make_model: MakeModel) -> None:
    folder = make_model()
    expected, state = logits(folder), load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys([*state, TIED_HEAD], "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(folder), expected)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"lacks tensor 'lm_head\.weight' that model.* promises"):
        open_checkpoint(folder)


def test_zero3_placeholders_are_named(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model()
    state = {name: torch.empty(0, dtype=t.dtype) for name, t in load_file(folder / "model.safetensors").items()}
    rewrite(folder, state, "safetensors")
    with pytest.raises(CheckpointError, match=r"is \[0\]: DeepSpeed ZeRO-3 .*zero_to_fp32\.py"):
        GPTNeoForCausalLM.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"is \[0\]: DeepSpeed ZeRO-3 .*zero_to_fp32\.py"):
        neoquant.quantize(folder, tmp_path / "out", NF4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("inner", [None, 40])
def test_the_promised_shapes_are_the_networks(tied: bool, inner: int | None) -> None:
    values = TINY_CONFIG | {"tie_word_embeddings": tied, "intermediate_size": inner}
    config = GPTNeoConfig.from_dict(values)
    with torch.device("meta"):
        network = CausalLM(config)
    promised = network_shapes(config) | head_shapes(config)
    assert promised == {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    assert promised == tiny_shapes(values)
