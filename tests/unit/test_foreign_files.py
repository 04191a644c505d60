"""Folders and files that look like a model: taken where it is clear what is meant, else said what they are."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import neoquant
from neoquant import GPTNeoForCausalLM, LoadWarning
from neoquant.checkpoint import find_companions, open_checkpoint
from neoquant.checkpoint.weight_files import WeightFiles, choose_weight_files
from neoquant.errors import CheckpointError, ConfigError

MakeModel = Callable[..., Path]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 539\n"
IDS = torch.arange(1, 9)[None]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "config.json", "model.safetensors.index.json"]
)
def test_a_git_lfs_pointer_is_called_one(make_model: MakeModel, name: str) -> None:
    folder = make_model()
    if name != "config.json":
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=rf"{name}: is a Git LFS pointer .* `git lfs pull`"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5 file"),
        (b"GGUF" + bytes(64), "GGUF file"),
        (b"\n<!doctype html><html><body>Sign in</body></html>", "a web page, not the file: download it again"),
        (gzip.compress(bytes(64), mtime=0), "compressed by gzip: unpack it"),
    ],
)
def test_files_of_other_kinds_are_named(make_model: MakeModel, content: bytes, message: str) -> None:
    folder = make_model()
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_a_bin_that_torch_did_not_write_is_not_said_to_hold_more_than_tensors(make_model: MakeModel) -> None:
    folder = make_model()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: is a safetensors file by another name"):
        open_checkpoint(folder)
    (folder / "pytorch_model.bin").write_bytes(b"7z\xbc\xaf" + bytes(64))
    with pytest.raises(CheckpointError, match=r"was not written by torch\.save: it begins with b'7z\\xbc\\xaf'"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["flax_model.msgpack"], r"flax_model\.msgpack holds Flax weights: .*from_flax=True"),
        (["flax_model-00001-of-00002.msgpack"], "holds Flax weights"),
        (["tf_model.h5"], r"tf_model\.h5 holds TensorFlow weights"),
        (["model.ckpt-400000.index", "model.ckpt-400000.meta"], "Mesh TensorFlow checkpoint.*convert_gpt_neo_mesh_tf"),
        (["shard_0/0.npz"], "shard_0 is of a Mesh Transformer JAX checkpoint"),
        (["zero_to_fp32.py", "latest", "global_step8/mp_rank_00_model_states.pt"], "python zero_to_fp32.py"),
        (["adapter_config.json", "adapter_model.safetensors"], "an adapter .*load_peft_model"),
        (["qmodel.pt"], "weights quantized by hqq"),
        (["model.onnx"], "ONNX file"),
        (["training_args.bin", "optimizer.pt"], r"expected one of model\.safetensors, .*index\.json$"),
    ],
)
def test_folders_of_other_programs_are_named(make_model: MakeModel, files: list[str], message: str) -> None:
    folder = make_model()
    (folder / "model.safetensors").unlink()
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"anything")
    with pytest.raises(CheckpointError, match=f"holds no weights that can be read, .*{message}"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("adapter_config.json", "an adapter .*load_peft_model"),
        ("checkpoint-500/config.json", "name one of them, as checkpoint-500"),
        ("global_step8/mp_rank_00_model_states.pt", "DeepSpeed checkpoint"),
        ("model.ckpt-400000.index", "Mesh TensorFlow checkpoint"),
        ("neo.gguf", "GGUF file"),
        ("README.md", "$"),
    ],
)
def test_folders_without_a_configuration_are_named(tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("anything")
    with pytest.raises(CheckpointError, match=rf"holds no config\.json, so it is not a model folder(; .*)?{message}"):
        open_checkpoint(tmp_path)


def test_the_only_weights_are_taken_whatever_they_are_called(make_model: MakeModel) -> None:
    folder = make_model()
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-128g.safetensors")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.headers.keys() == weights.keys()
        assert checkpoint.notes == (
            "weights are read from gptq_model-4bit-128g.safetensors, the only file of weights there",
        )
    with pytest.warns(LoadWarning, match=r"read from gptq_model-4bit-128g\.safetensors"):
        GPTNeoForCausalLM.from_pretrained(folder)
    shutil.copy(folder / "gptq_model-4bit-128g.safetensors", folder / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"several files of weights: gptq_.*, other\.safetensors; call"):
        open_checkpoint(folder)


def test_shards_without_an_index(make_model: MakeModel) -> None:
    folder = make_model()
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    for number, part in enumerate((names[:9], names[9:]), 1):
        save_file({name: weights[name] for name in part}, folder / f"model-0000{number}-of-00002.safetensors")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.headers.keys() == weights.keys()
        assert checkpoint.notes == ("no index names the 2 shards of model.safetensors; all are read",)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds 1 of 2 shards of model\.safetensors, and no index"):
        open_checkpoint(folder)


def test_which_files_are_weights() -> None:
    assert choose_weight_files([]) is None
    assert choose_weight_files(["training_args.bin", "optimizer.pt", "rng_state_0.pth", "README.md"]) is None
    assert choose_weight_files(["x.bin", "y.safetensors"]) == WeightFiles(
        None, ("y.safetensors",), "weights are read from y.safetensors, the only file of weights there"
    )
    sharded = ["q.safetensors.index.json", "q-00001-of-00002.safetensors", "q-00002-of-00002.safetensors"]
    found = choose_weight_files(sharded)
    assert found is not None and (found.index_file, found.files) == (sharded[0], tuple(sharded[1:]))


def test_a_folder_of_the_hubs_cache_is_its_snapshot(make_model: MakeModel, tmp_path: Path) -> None:
    cache = tmp_path / "models--someone--neo"
    for commit in ("a1", "b2"):
        shutil.copytree(make_model(commit), cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("b2")
    with open_checkpoint(cache) as checkpoint:
        assert checkpoint.folder == cache / "snapshots" / "b2"
    assert find_companions(cache) == cache / "snapshots" / "b2"
    (cache / "refs" / "main").write_text("../../elsewhere")
    with pytest.raises(CheckpointError, match=r"hub's cache .*name one of .*snapshots/\.\.\. \(it holds a1, b2\)"):
        open_checkpoint(cache)
    shutil.rmtree(cache / "snapshots" / "b2")
    with open_checkpoint(cache) as checkpoint:
        assert checkpoint.folder == cache / "snapshots" / "a1", "the only one there is"


def test_autogptqs_own_file_says_how_weights_are_quantized(make_model: MakeModel, tmp_path: Path) -> None:
    import neoquant

    recipe = neoquant.Recipe.simple(4, "affine", group_size=32, symmetric=True, format="gptq")
    made = neoquant.quantize(make_model(hidden_size=32, num_heads=4), tmp_path / "out", recipe).folder
    expected = GPTNeoForCausalLM.from_pretrained(made)(IDS).logits
    config = json.loads((made / "config.json").read_text())
    del config["quantization_config"]
    (made / "config.json").write_text(json.dumps(config))
    (made / "quantize_config.json").write_text(
        json.dumps({"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": True})
    )
    (made / "model.safetensors").rename(made / "gptq_model-4bit-32g.safetensors")
    with pytest.warns(LoadWarning, match=r"quantization_config is read from quantize_config\.json"):
        model = GPTNeoForCausalLM.from_pretrained(made)
    assert torch.equal(model(IDS).logits, expected)
    (made / "quantize_config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"quantize_config\.json: not a JSON object"):
        open_checkpoint(made)


def test_types_that_this_torch_lacks_are_not_needed() -> None:
    """torch.float8_e8m0fnu came with torch 2.7."""
    program = (
        "import torch; del torch.float8_e8m0fnu; import neoquant; from neoquant.checkpoint.headers import DTYPES;"
        "assert 'F8_E8M0' not in DTYPES"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


EXTRA = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "C64": torch.complex64,
    "complex128": torch.complex128,
}


@pytest.mark.parametrize("dtype", EXTRA.values(), ids=EXTRA)
def test_tensors_beside_the_models_may_be_of_any_type(
    make_model: MakeModel, tmp_path: Path, dtype: torch.dtype
) -> None:
    """What no safetensors file holds is refused by name where one would be written."""
    folder = make_model()
    weights = load_file(folder / "model.safetensors")
    extra = torch.tensor([1.0, 2.0]).to(dtype)
    if dtype == torch.complex128:
        (folder / "model.safetensors").unlink()
        torch.save({**weights, "extra": extra}, folder / "pytorch_model.bin")
    else:
        save_file({**weights, "extra": extra}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(LoadWarning, match="also holds extra"):
        model = GPTNeoForCausalLM.from_pretrained(folder)
    assert torch.equal(model.transformer.ln_f.bias, weights["transformer.ln_f.bias"])
    for make in (
        lambda out: neoquant.quantize(folder, out, "nf4"),
        lambda out: neoquant.convert(folder, out, "safetensors"),
    ):
        if dtype == torch.complex128:
            with pytest.raises(CheckpointError, match=r"tensor 'extra' is torch\.complex128, which safetensors cannot"):
                make(tmp_path / "out")
            assert not (tmp_path / "out").exists()
            continue
        make(tmp_path / "out")
        found = load_file(tmp_path / "out" / "model.safetensors")["extra"]
        assert found.to(torch.complex64).tolist() == [1, 2]
        shutil.rmtree(tmp_path / "out")
