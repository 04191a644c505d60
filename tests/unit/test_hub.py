"""Models by name, from a stand-in for the hub that serves the few addresses needed and counts what it sends."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hub_stand_in import COMMIT, OLD_COMMIT, StandIn, go_offline
from safetensors.torch import load_file, save

from neoquant.checkpoint import hub, open_checkpoint
from neoquant.errors import CheckpointError, ConfigError, HubError
from neoquant.model.names import EMBEDDING, TIED_HEAD
from neoquant.progress import Progress
from neoquant.quantization.quantize import plan, quantize
from neoquant.quantization.recipe import Recipe

CONFIG = json.dumps({"model_type": "gpt_neo", "hidden_size": 64}).encode()
TENSORS = {f"transformer.h.{n}.mlp.c_fc.weight": torch.full((256, 64), float(n)) for n in range(8)}


@pytest.fixture
def stand_in(bare_hub: StandIn) -> StandIn:
    bare_hub.files = {
        "config.json": CONFIG,
        "tokenizer.json": b"{}",
        "README.md": b"# card",
        "model.safetensors": save(TENSORS),
    }
    return bare_hub


def shards() -> dict[str, bytes]:
    names = list(TENSORS)
    parts = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    files = {file: save({name: TENSORS[name] for name in part}) for file, part in parts.items()}
    return {"config.json": CONFIG, "model.safetensors.index.json": json.dumps(index).encode(), **files}


def test_a_model_by_name(stand_in: StandIn) -> None:
    with open_checkpoint("user/neo") as checkpoint:
        assert checkpoint.source == "user/neo"
        assert checkpoint.revision == COMMIT
        assert all(torch.equal(checkpoint.read(name), TENSORS[name]) for name in TENSORS)
        assert [path.name for path in checkpoint.companions()] == ["tokenizer.json"]
    assert stand_in.tokens == {"Bearer hf_secret"}


def test_a_revision_is_resolved_to_its_commit(stand_in: StandIn) -> None:
    with open_checkpoint("user/neo", revision="v1") as checkpoint:
        assert checkpoint.revision == OLD_COMMIT


def test_a_folder_of_that_name_wins(stand_in: StandIn, tmp_path: Path) -> None:
    (tmp_path / "user" / "neo").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"holds no config.json"):
        open_checkpoint("user/neo")


def test_one_kind_of_weights_is_fetched(stand_in: StandIn) -> None:
    stand_in.files |= dict.fromkeys(
        ["pytorch_model.bin", "flax_model.msgpack", "rust_model.ot", "onnx/model.onnx", "onnx/config.json"], b"large"
    )
    open_checkpoint("user/neo").close()
    assert set(stand_in.sent) == {"config.json", "tokenizer.json", "model.safetensors"}


def test_a_tokenizer_and_a_configuration_need_no_weights(stand_in: StandIn) -> None:
    from neoquant.checkpoint import find_companions
    from neoquant.hf.auto import AutoConfig

    assert (find_companions("user/neo") / "tokenizer.json").is_file()
    assert AutoConfig.from_pretrained("user/neo", revision="v1").num_layers >= 1
    assert set(stand_in.sent) == {"config.json", "tokenizer.json"}


@pytest.mark.parametrize("revision", [None, "v1"])
def test_headers_are_kilobytes(stand_in: StandIn, revision: str | None) -> None:
    stand_in.files["model.safetensors"] = save({**TENSORS, "large": torch.zeros(500_000)})
    with open_checkpoint("user/neo", revision=revision, headers_only=True) as checkpoint:
        assert checkpoint.headers.keys() == {*TENSORS, "large"}
        assert checkpoint.headers["large"].shape == (500_000,)
        assert checkpoint.revision == stand_in.revisions[revision or "main"]
        assert checkpoint.folder is None
        with pytest.raises(CheckpointError, match="only the headers of user/neo were fetched"):
            checkpoint.read("large")
        with pytest.raises(CheckpointError, match="only the headers"):
            checkpoint.companions()
    assert sum(stand_in.sent.values()) < 110_000


def test_headers_are_the_same_near_and_far(stand_in: StandIn) -> None:
    for files in (dict(stand_in.files), shards()):
        stand_in.files = files
        stand_in.revisions["main"] = hashlib.sha1(repr(sorted(files)).encode()).hexdigest()
        stand_in.revisions[stand_in.revisions["main"]] = stand_in.revisions["main"]
        far = open_checkpoint("user/neo", headers_only=True)
        with open_checkpoint("user/neo") as near:
            assert list(far.headers.items()) == list(near.headers.items())
            assert (far.nbytes, far.config, far.revision) == (near.nbytes, near.config, near.revision)
            assert torch.equal(near.read(list(TENSORS)[5]), TENSORS[list(TENSORS)[5]])


def test_weights_by_another_name_and_their_own_description(stand_in: StandIn) -> None:
    stand_in.files = {
        "config.json": CONFIG,
        "quantize_config.json": b'{"bits": 4, "group_size": 32, "sym": true}',
        "gptq_model-4bit-32g.safetensors": save(TENSORS),
    }
    for headers_only in (True, False):
        with open_checkpoint("user/neo", headers_only=headers_only) as checkpoint:
            assert checkpoint.headers.keys() == TENSORS.keys()
            stated = checkpoint.config["quantization_config"]
            assert stated == {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}


def test_what_a_repository_holds_instead_of_weights_is_said(stand_in: StandIn) -> None:
    stand_in.files = {"config.json": CONFIG, "flax_model.msgpack": b"x"}
    with pytest.raises(HubError, match=r"user/neo holds no weights .*; flax_model\.msgpack holds Flax weights"):
        open_checkpoint("user/neo")


@pytest.mark.parametrize("same", [True, False])
def test_a_head_far_away_is_compared_once_it_is_here(
    stand_in: StandIn, make_model: Callable[..., Path], tmp_path: Path, same: bool
) -> None:
    """Headers alone cannot say whether a head is the embedding that config.json ties it to."""
    source = make_model()
    state = load_file(source / "model.safetensors")
    state[TIED_HEAD] = state[EMBEDDING].clone() if same else state[EMBEDDING] + 1
    stand_in.files = {
        "config.json": (source / "config.json").read_bytes(), "tokenizer.json": b"{}", "model.safetensors": save(state)
    }  # fmt: skip
    recipe = Recipe.simple(4, "nf4")
    planned = plan("user/neo", recipe)
    assert any("quantizing keeps it if the values differ" in note for note in planned.notes)
    made = quantize("user/neo", tmp_path / "out", recipe)
    stored = load_file(made.folder / "model.safetensors")
    assert (TIED_HEAD in stored) == (not same)
    if not same:
        assert torch.equal(stored[TIED_HEAD], state[TIED_HEAD])
        assert json.loads((made.folder / "config.json").read_text())["tie_word_embeddings"] is False
        assert any(note.startswith("lm_head.weight differs") for note in made.plan.notes)


def test_headers_of_a_torch_file_need_the_file(stand_in: StandIn, tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "weights")
    stand_in.files = {"config.json": CONFIG, "pytorch_model.bin": (tmp_path / "weights").read_bytes()}
    with open_checkpoint("user/neo", headers_only=True) as checkpoint:
        assert list(checkpoint.headers) == list(TENSORS)


def test_the_cache_serves_offline(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.files["flax_model.msgpack"] = b"never fetched"
    open_checkpoint("user/neo").close()
    stand_in.sent.clear()
    go_offline(monkeypatch)
    for headers_only in (True, False):
        with open_checkpoint("user/neo", headers_only=headers_only) as checkpoint:
            assert checkpoint.revision == COMMIT
            assert torch.equal(checkpoint.read(list(TENSORS)[3]), TENSORS[list(TENSORS)[3]])
    assert stand_in.sent == {}


def test_offline_and_not_in_the_cache(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    open_checkpoint("user/neo", headers_only=True).close()
    go_offline(monkeypatch)
    with pytest.raises(HubError, match=r"the copy of user/neo in the cache .* holds no weights"):
        open_checkpoint("user/neo")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set while user/neo at revision v1 is not in the cache"):
        open_checkpoint("user/neo", revision="v1")
    with pytest.raises(HubError, match="there is no folder other here, and HF_HUB_OFFLINE is set"):
        open_checkpoint("other", headers_only=True)


@pytest.mark.parametrize("headers_only", [True, False])
@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((404, "RepoNotFound"), "there is no model user/x on the hub, and no folder of that name here"),
        ((401, "RepoNotFound"), "there is no model user/x on the hub"),
        ((403, "GatedRepo"), "user/x is gated: accept its terms at http://127.0.0.1:[0-9]+/user/x, then set HF_TOKEN"),
        ((500, ""), "answered 500 for user/x; try again later"),
    ],
)
def test_what_the_hub_refuses(stand_in: StandIn, refusal: tuple[int, str], message: str, headers_only: bool) -> None:
    stand_in.refusals["user/x"] = refusal
    with pytest.raises(HubError, match=message) as caught:
        open_checkpoint("user/x", headers_only=headers_only)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_a_token_is_said(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_\u00fcml\u00e4ut")
    with pytest.raises(HubError, match=r"the token \(HF_TOKEN, .*\) is none of the hub's: it is not ASCII"):
        open_checkpoint("user/neo")


def test_a_revision_that_is_not_there(stand_in: StandIn) -> None:
    with pytest.raises(HubError, match="user/neo has no revision 'v9', expected a branch, tag or commit"):
        open_checkpoint("user/neo", revision="v9")


@pytest.mark.parametrize("name", ["double--dash", "trailing.", "x" * 97])
def test_names_the_hub_does_not_allow(stand_in: StandIn, name: str) -> None:
    with pytest.raises(HubError, match="cannot be the name of a model on the hub, and there is no such folder"):
        open_checkpoint(name)


def test_nobody_answers(stand_in: StandIn) -> None:
    stand_in.shutdown()
    stand_in.server_close()
    with pytest.raises(HubError, match=r"there is no folder user/neo here, and the hub at .* cannot be reached"):
        open_checkpoint("user/neo")


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({"config.json": CONFIG}, HubError, "user/neo holds no weights that can be read, expected one of model.safe"),
        ({"model.safetensors": save(TENSORS)}, CheckpointError, "no config.json"),
        ({"config.json": b'{"model_type": "bert"}', "model.safetensors": save(TENSORS)}, ConfigError, "'bert'"),
        (
            {"config.json": CONFIG, "model.safetensors": b"\x08\0\0\0\0\0\0\0not json"},
            CheckpointError,
            "model.safetensors",
        ),
    ],
)
@pytest.mark.parametrize("headers_only", [True, False])
def test_models_that_are_not_whole(
    stand_in: StandIn, files: dict[str, bytes], error: type[Exception], message: str, headers_only: bool
) -> None:
    stand_in.files = files
    with pytest.raises((error, HubError), match=message):
        open_checkpoint("user/neo", headers_only=headers_only)


def test_nothing_large_is_fetched_of_another_architecture(stand_in: StandIn) -> None:
    stand_in.files["config.json"] = b'{"model_type": "llama"}'
    with pytest.raises(ConfigError, match="model_type is 'llama'"):
        open_checkpoint("user/neo")
    assert set(stand_in.sent) == {"config.json"}


def test_nothing_is_fetched_twice(stand_in: StandIn) -> None:
    open_checkpoint("user/neo", headers_only=True).close()
    stand_in.sent.clear()
    open_checkpoint("user/neo").close()
    assert set(stand_in.sent) == {"tokenizer.json", "model.safetensors"}
    stand_in.sent.clear()
    open_checkpoint("user/neo").close()
    assert stand_in.sent == {}


def test_a_cache_without_room(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(HubError, match=r"cannot store user/neo in .*No space left.*; set HF_HOME"):
        open_checkpoint("user/neo")


def test_progress_counts_the_bytes_and_nothing_is_printed(stand_in: StandIn, capfd: pytest.CaptureFixture[str]) -> None:
    class Recorder(Progress):
        total = done = 0.0

        @contextmanager
        def task(self, label: str, total: float) -> Iterator[Callable[[float], None]]:
            assert label == "downloading user/neo"
            self.total = total
            yield self.advance

        def advance(self, amount: float) -> None:
            self.done += amount

    recorder = Recorder()
    open_checkpoint("user/neo", progress=recorder).close()
    expected = sum(len(stand_in.files[name]) for name in ("tokenizer.json", "model.safetensors"))
    assert recorder.total == recorder.done == expected
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["gpt2", "EleutherAI/gpt-neo-1.3B", "user/a_b.c", "_x/1"])
def test_names_that_may_be_models(name: str) -> None:
    assert hub.is_model_id(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "./x", "a/b/c", "/a", "a/", "-x", "a b", "C:\\x", "http://x", "a\n", "é"]
)
def test_names_that_cannot_be_models(name: str) -> None:
    assert not hub.is_model_id(name)
