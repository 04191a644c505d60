"""Every kind of weights file that a GPT-Neo comes in, read tensor by tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from neoquant.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint, torch_file
from neoquant.errors import CheckpointError, RequestError

WTE = torch.arange(30, dtype=torch.float32).reshape(5, 6)


def model_folder(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "gpt_neo", "hidden_size": 6}')
    return folder


def old_state() -> dict[str, torch.Tensor]:
    """What a pytorch_model.bin of 2021 holds: masks, a tied head, views of other tensors."""
    return {
        "transformer.wte.weight": WTE,
        "transformer.h.0.attn.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "transformer.h.0.attn.attention.masked_bias": torch.tensor(-1e9),
        "transformer.h.0.attn.attention.out_proj.bias": torch.ones(6),
        "transformer.h.0.mlp.c_fc.weight": torch.arange(12, dtype=torch.float16).reshape(3, 4).t(),
        "transformer.h.0.mlp.c_fc.bias": torch.arange(20.0)[4:16:3],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "lm_head.weight": WTE,
    }


KEPT = [name for name in old_state() if "attention." not in name or "out_proj" in name][:-1]
DROPPED = (
    "transformer.h.0.attn.attention.bias",
    "transformer.h.0.attn.attention.masked_bias",
    "lm_head.weight",
)


def assert_reads_old_state(checkpoint: Checkpoint) -> None:
    assert list(checkpoint.headers) == KEPT
    assert checkpoint.dropped == DROPPED
    for name, header in checkpoint.headers.items():
        tensor, expected = checkpoint.read(name), old_state()[name]
        assert (header.name, header.dtype, header.shape) == (name, expected.dtype, tuple(expected.shape))
        assert tensor.dtype == expected.dtype
        assert tensor.is_contiguous()
        assert torch.equal(checkpoint.view(name), tensor)
        checkpoint.forget(name)
        assert torch.equal(checkpoint.view(name), tensor)
        assert torch.equal(tensor, expected)
    assert checkpoint.nbytes == sum(old_state()[name].nbytes for name in KEPT)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_torch_file(tmp_path: Path, zipped: bool, kind: Callable[..., dict[str, torch.Tensor]]) -> None:
    folder = model_folder(tmp_path)
    torch.save(kind(old_state()), folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with open_checkpoint(folder) as checkpoint:
        assert_reads_old_state(checkpoint)


def test_torch_file_of_parameters(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    torch.save({"a": torch.nn.Parameter(WTE)}, folder / "pytorch_model.bin")
    with open_checkpoint(folder) as checkpoint:
        assert type(checkpoint.read("a")) is torch.Tensor
        assert not checkpoint.read("a").requires_grad
        assert torch.equal(checkpoint.read("a"), WTE)


def test_torch_file_somebody_compressed(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    torch.save(old_state(), tmp_path / "plain")
    with zipfile.ZipFile(tmp_path / "plain") as plain, zipfile.ZipFile(folder / "pytorch_model.bin", "w") as packed:
        for member in plain.infolist():
            packed.writestr(member.filename, plain.read(member), zipfile.ZIP_DEFLATED)
    with open_checkpoint(folder) as checkpoint:
        assert_reads_old_state(checkpoint)


def test_torch_file_of_a_torch_that_notes_no_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path)
    torch.save(old_state(), folder / "pytorch_model.bin")
    monkeypatch.setattr(torch_file, "_place", lambda tensor: None)
    with open_checkpoint(folder) as checkpoint:
        assert_reads_old_state(checkpoint)


def test_sharded_torch_files(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    state = old_state()
    shards: dict[str, dict[str, torch.Tensor]] = {
        "pytorch_model-00001-of-00002.bin": {},
        "pytorch_model-00002-of-00002.bin": {},
    }
    for name, tensor in state.items():
        number = 1 if name in ("transformer.wte.weight", "lm_head.weight", *KEPT[:3]) or "bias" in name else 2
        shards[f"pytorch_model-0000{number}-of-00002.bin"][name] = tensor
    for file, part in shards.items():
        torch.save(part, folder / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with open_checkpoint(folder) as checkpoint:
        assert set(checkpoint.headers) == set(KEPT)
        assert set(checkpoint.dropped) == set(DROPPED)
        assert all(torch.equal(checkpoint.read(name), state[name]) for name in KEPT)


@pytest.mark.parametrize("shard_size", ["1KB", "5GB"])
def test_what_transformers_saves(tmp_path: Path, shard_size: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTNeoConfig(
        vocab_size=11, hidden_size=8, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
    )
    model = transformers.GPTNeoForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    with open_checkpoint(tmp_path) as checkpoint:
        state = model.state_dict()
        assert set(checkpoint.headers) == set(state) - {"lm_head.weight"}
        assert all(torch.equal(checkpoint.read(name), state[name]) for name in checkpoint.headers)
        assert checkpoint.config == json.loads((tmp_path / "config.json").read_text())


def test_safetensors_in_file_order_without_masks(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in old_state().items()}
    with CheckpointWriter(folder / "out", tensors=len(state)) as sink:
        for name, tensor in state.items():
            sink.put(name, tensor)
        sink.finish({"model_type": "gpt_neo"}, files={})
    with open_checkpoint(folder / "out") as checkpoint:
        assert set(checkpoint.headers) == {*KEPT, "lm_head.weight"}, "what safetensors holds twice is there twice"
        assert checkpoint.dropped == DROPPED[:2]
        assert all(torch.equal(checkpoint.read(name), state[name]) for name in checkpoint.headers)


def test_the_best_kind_of_weights_is_preferred(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    torch.save({"from_bin": WTE}, folder / "pytorch_model.bin")
    assert list(open_checkpoint(folder).headers) == ["from_bin"]
    save_file({"from_safetensors": WTE}, folder / "model.safetensors")
    assert list(open_checkpoint(folder).headers) == ["from_safetensors"]


def test_a_tensor_is_the_readers_own(tmp_path: Path) -> None:
    """Changing a tensor changes neither the file nor the next reader's tensor."""
    folder = model_folder(tmp_path)
    save_file({"a": WTE}, folder / "model.safetensors")
    with open_checkpoint(folder) as checkpoint:
        checkpoint.read("a").zero_()
        assert torch.equal(checkpoint.read("a"), WTE)
    assert torch.equal(load_file(folder / "model.safetensors")["a"], WTE)


def test_companions_travel_and_the_rest_does_not(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    save_file({"a": WTE}, folder / "model.safetensors")
    travel = ["LICENSE", "added_tokens.json", "chat_template.jinja", "generation_config.json", "merges.txt",
              "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"]  # fmt: skip
    for name in [*travel, "README.md", "flax_model.msgpack", "training_args.bin", "notes.txt"]:
        (folder / name).write_text("")
    (folder / "chat_templates").mkdir()
    with open_checkpoint(folder) as checkpoint:
        assert [path.name for path in checkpoint.companions()] == travel


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    save_file({"a": WTE}, folder / "model.safetensors")
    with open_checkpoint(folder) as checkpoint, pytest.raises(CheckpointError, match="has no tensor 'b'"):
        checkpoint.read("b")


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is a folder, and only models on the hub have revisions"):
        open_checkpoint(tmp_path, revision="main")


def test_memory_of_a_torch_file_is_a_tensor(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    torch.save({str(n): torch.zeros(1_000_000) for n in range(40)}, folder / "pytorch_model.bin")
    script = """
import resource, sys, torch
from neoquant.checkpoint import open_checkpoint
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
with open_checkpoint(sys.argv[1]) as checkpoint:
    before = peak()
    for name in checkpoint.headers:
        checkpoint.read(name)
print(peak() - before)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert int(done.stdout) < 64, "MiB more than before, for 160 MB read"


@pytest.mark.real_data
def test_a_real_model(real_data: Path) -> None:
    folder = real_data / "models" / "neo-8m"
    expected = load_file(folder / "model.safetensors")
    with open_checkpoint(folder) as checkpoint:
        assert set(checkpoint.headers) == set(expected)
        assert all(torch.equal(checkpoint.read(name), expected[name]) for name in checkpoint.headers)


@pytest.mark.parametrize("shift", range(9))
def test_a_view_is_what_lies_in_the_file_wherever_it_begins(tmp_path: Path, shift: int) -> None:
    """Other writers align neither the header nor the tensors."""
    folder = model_folder(tmp_path / "model")
    tensors = {"a": torch.arange(7, dtype=torch.uint8), "b": WTE, "c": torch.randn(3001, 2).half()}
    save_file(tensors, folder / "model.safetensors")
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip() + b" " * shift
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    with open_checkpoint(folder) as checkpoint:
        views = {name: checkpoint.view(name) for name in tensors}
        for name in ("a", "c"):  # what is forgotten can still be used, and its neighbours lose nothing
            checkpoint.forget(name)
    assert all(torch.equal(views[name], tensor) for name, tensor in tensors.items())


def test_writing_to_a_view_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    save_file({"wte": WTE}, folder / "model.safetensors")
    before = (folder / "model.safetensors").read_bytes()
    with open_checkpoint(folder) as checkpoint:
        checkpoint.view("wte").zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_view_of_a_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    save_file({"wte": WTE}, folder / "model.safetensors")
    with open_checkpoint(folder) as checkpoint:
        os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 4)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: ends 4 bytes before the end of tensor 'wte'"):
            checkpoint.view("wte")
