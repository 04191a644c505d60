"""Sending a model to the hub: what is sent, who may, and that what arrives is read back by its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Cli, write_tiny_model
from hub_stand_in import COMMIT, StandIn, go_offline
from safetensors.torch import load_file

import neoquant
from neoquant.checkpoint import push
from neoquant.checkpoint.upload import GATED
from neoquant.errors import CheckpointError, HubError, RequestError

MODEL = "user/neo-nf4"
SENT = {"README.md", "config.json", "generation_config.json", "model.safetensors", "neoquant.json"}
SENT |= {"tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    return neoquant.quantize(write_tiny_model(folder / "source"), folder / "nf4", neoquant.Recipe.simple()).folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of one's own, with things in it that are no part of a model."""
    copy = tmp_path / "nf4"
    copy.mkdir()
    for path in made.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "notes.txt").write_text("mine")
    (copy / ".env").write_text("SECRET=1")
    (copy / "old.safetensors").write_bytes(b"")
    (copy / "logs").mkdir()
    return copy


def test_what_was_sent_is_read_back_by_its_name(bare_hub: StandIn, folder: Path) -> None:
    sent = push(folder, MODEL)
    assert set(sent.files) == SENT and set(sent.left_out) == {"notes.txt", ".env", "old.safetensors", "logs"}
    assert (sent.commit, sent.url) == (COMMIT, f"{bare_hub.url}/{MODEL}/commit/{COMMIT}")
    arrived = bare_hub.repos[MODEL]
    assert arrived == {name: (folder / name).read_bytes() for name in SENT} | {".gitattributes": b""}
    assert MODEL not in bare_hub.private and bare_hub.log.count("commit") == 1
    near, _ = neoquant.load(folder, device="cpu")
    far, _ = neoquant.load(MODEL, device="cpu")
    ids = torch.arange(9)[None]
    assert torch.equal(near(ids).logits, far(ids).logits)


def test_a_dry_run_asks_nobody(
    bare_hub: StandIn,
    folder: Path,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    go_offline(monkeypatch)
    result = cli("push", folder, MODEL, "--dry-run", "--json", "plan.json")
    assert result.code == 0 and "dry run: nothing was sent" in result.out
    for name in SENT:
        assert f"  {name}\n" in result.out
    assert "part of the model: .env, logs, notes.txt, old.safetensors" in result.err
    plan = json.loads(Path("plan.json").read_text())
    assert plan["commit"] is None and plan["files"] == {name: (folder / name).stat().st_size for name in SENT}
    assert not bare_hub.tokens and not bare_hub.log


def test_private_and_gated(bare_hub: StandIn, folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    result = cli("push", folder, MODEL, "--private", "--gated", "manual", "--message", "First")
    assert result.code == 0 and f"{bare_hub.url}/{MODEL}/commit/" in result.out
    assert bare_hub.private == {MODEL} and bare_hub.gated == {MODEL: "manual"}
    assert bare_hub.log.index("settings") < bare_hub.log.index("commit"), "gated before anything can be fetched"
    assert cli("info", MODEL).code == 0
    assert cli("push", folder, MODEL, "--private").code == 0, "again, to the same"
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    assert "there is no model user/neo-nf4 on the hub" in cli("info", MODEL).error


def test_private_is_not_sent_to_what_is_public(bare_hub: StandIn, folder: Path) -> None:
    bare_hub.repos[MODEL] = {}
    with pytest.raises(HubError, match="user/neo-nf4 is there already, and public"):
        push(folder, MODEL, private=True)
    assert bare_hub.repos[MODEL] == {} and not bare_hub.log


def test_a_branch_is_made_and_old_weights_give_way(bare_hub: StandIn, folder: Path) -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    kept = {"onnx/model.bin": b"", "banner.png": b"", ".gitattributes": b""}
    bare_hub.repos[MODEL] = dict.fromkeys([*shards, "pytorch_model.bin"], b"old") | kept
    sent = push(folder, MODEL, revision="nf4")
    assert list(sent.removed) == [*shards, "pytorch_model.bin"] and sent.revision == "nf4"
    assert set(bare_hub.repos[MODEL]) == SENT | kept.keys()
    assert bare_hub.revisions["nf4"] == COMMIT and bare_hub.log[0] == "branch"


def test_shards_and_their_index_are_sent(bare_hub: StandIn, made: Path, tmp_path: Path) -> None:
    sharded = neoquant.convert(made, tmp_path / "sharded", "packed", shard_size=8000).folder
    files = set(push(sharded, MODEL, dry_run=True).files)
    assert {"model.safetensors.index.json", *(path.name for path in sharded.glob("model-*"))} < files
    push(sharded, MODEL)
    assert neoquant.GPTNeoForCausalLM.from_pretrained(MODEL, device_map="cpu")


def autogptq(made: Path, folder: Path) -> Path:
    """The model as AutoGPTQ wrote it: how it is quantized in a file of its own, and one shard, which an index names."""
    model = neoquant.convert(made, folder, "packed").folder
    config = json.loads((model / "config.json").read_text())
    stated = config.pop("quantization_config")
    (model / "config.json").write_text(json.dumps(config))
    (model / "quantize_config.json").write_text(json.dumps(stated))
    shard = "gptq_model-4bit-32g-00001-of-00001.safetensors"
    (model / "model.safetensors").rename(model / shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(model / shard), shard)}
    (model / "gptq_model-4bit-32g.safetensors.index.json").write_text(json.dumps(index))
    return model


def test_what_says_how_weights_are_read_is_sent(bare_hub: StandIn, made: Path, tmp_path: Path) -> None:
    model = autogptq(made, tmp_path / "gptq")
    sent = push(model, MODEL)
    assert sent.files.keys() == {path.name for path in model.iterdir()} and not sent.left_out
    near, far = (neoquant.GPTNeoForCausalLM.from_pretrained(where, device_map="cpu") for where in (model, MODEL))
    ids = torch.arange(9)[None]
    assert torch.equal(near(ids).logits, far(ids).logits)


def test_what_said_how_old_weights_are_read_gives_way(bare_hub: StandIn, made: Path, tmp_path: Path) -> None:
    push(autogptq(made, tmp_path / "gptq"), MODEL)
    training = {"training_args.bin": b"", "optimizer.bin": b"", "adapter_model.safetensors": b""}
    bare_hub.repos[MODEL] |= training
    index, shard = "gptq_model-4bit-32g.safetensors.index.json", "gptq_model-4bit-32g-00001-of-00001.safetensors"
    assert push(made, MODEL).removed == (shard, index, "quantize_config.json")
    assert set(bare_hub.repos[MODEL]) == SENT | training.keys() | {".gitattributes"}


def test_what_is_refused(bare_hub: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("neo", "a/b/c", "user/", "../x"):
        with pytest.raises(RequestError, match="is no name on the hub: expected user/name"):
            push(folder, name)
    with pytest.raises(RequestError, match=f"gated is 'yes'; legal are {' and '.join(GATED)}"):
        push(folder, MODEL, gated="yes")
    with pytest.raises(CheckpointError, match="there is no folder 'nowhere'"):
        push("nowhere", MODEL)
    with pytest.raises(HubError, match="user/double--dash"):
        push(folder, "user/double--dash")
    with pytest.raises(HubError, match=r"the token may not write to other/neo \(You don't have the rights"):
        push(folder, "other/neo")
    card = folder / "README.md"
    text = card.read_text()
    card.write_text(text.replace("pipeline_tag: text-generation", "pipeline_tag: 7"))
    with pytest.raises(HubError, match=r"user/neo-nf4: Invalid metadata in README.md. - pipeline_tag must be a string"):
        push(folder, MODEL)
    card.write_text(text)
    bare_hub.repos[MODEL] = {}
    for status, message in ((403, "may not write to user/neo-nf4 .Read-only"), (400, "answered 400 for .*Too many")):
        said = "Read-only token." if status == 403 else "Too many files"
        monkeypatch.setitem(bare_hub.refusals, MODEL, (status, said))
        monkeypatch.setattr(
            "huggingface_hub.HfApi.model_info", lambda *_, **__: type("Info", (), {"private": False, "siblings": []})
        )
        with pytest.raises(HubError, match=message) as caught:
            push(folder, MODEL)
        assert "\n" not in str(caught.value)
    assert not bare_hub.repos[MODEL]


def test_without_a_card_a_token_or_the_hub(
    bare_hub: StandIn,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match=r"does not know the token .*Invalid user token.*: set HF_TOKEN to a valid one"):
        push(folder, MODEL)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(folder / "none"))
    with pytest.raises(HubError, match=r"no token: set HF_TOKEN to one that may write to user/neo-nf4 \(from http"):
        push(folder, MODEL)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with monkeypatch.context() as patched:
        go_offline(patched)
        with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, so nothing can be sent to user/neo-nf4"):
            push(folder, MODEL)
    bare_hub.shutdown()
    bare_hub.server_close()
    with pytest.raises(HubError, match=r"the hub at http://127.0.0.1:\d+ cannot be reached .*nothing was published"):
        push(folder, MODEL)
    (folder / "README.md").unlink()
    with pytest.raises(CheckpointError, match=r"holds no README\.md, the model card"):
        push(folder, MODEL)
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="truncated"):
        push(folder, MODEL, dry_run=True)


def test_a_transfer_that_breaks_off(bare_hub: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own storage has a library of its own, which the stand-in does not serve."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    with pytest.raises(HubError, match="user/neo-nf4") as caught:
        push(folder, MODEL)
    assert "\n" not in str(caught.value) and bare_hub.repos[MODEL] == {".gitattributes": b""}


def test_a_link_out_of_the_folder_and_a_local_path_are_refused(folder: Path, tmp_path: Path) -> None:
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(f"{card}\nMeasured on {tmp_path}/texts.jsonl\n")
    with pytest.raises(CheckpointError, match=r"README\.md names .*, a path on this machine: take it out"):
        push(folder, MODEL, dry_run=True)
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match=r"README\.md is a link to /etc/passwd, outside the folder"):
        push(folder, MODEL, dry_run=True)


@pytest.mark.parametrize("name", ["config.json", "neoquant.json", "tokenizer_config.json"])
def test_a_local_path_in_what_describes_the_model_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    stated = json.loads((folder / name).read_text())
    for key, value, message in (
        ("seen", f"{tmp_path}/texts.jsonl", f"names {tmp_path}, a path on this machine"),
        ("_name_or_path", "/data/models/gpt-neo", '_name_or_path is "/data/models/gpt-neo", a path on a machine'),
        ("name_or_path", "C:\\models\\neo", "name_or_path is .*models.*, a path on a machine"),
    ):
        (folder / name).write_text(json.dumps(stated | {key: value}))
        with pytest.raises(CheckpointError, match=f"{name} (says )?{message}: take it out"):
            push(folder, MODEL, dry_run=True)
    (folder / name).write_text(json.dumps(stated | {"name_or_path": "EleutherAI/gpt-neo-125m"}))
    assert name in push(folder, MODEL, dry_run=True).files


def test_where_a_source_lay_is_not_written(tmp_path: Path) -> None:
    """transformers 4 writes it into config.json."""
    source = write_tiny_model(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"_name_or_path": str(source)}))
    made = neoquant.quantize(source, tmp_path / "nf4", neoquant.Recipe.simple()).folder
    neoquant.convert(made, tmp_path / "plain", dequantize=True)
    neoquant.GPTNeoForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "saved")
    for name in ("nf4", "plain", "saved"):
        assert str(tmp_path) not in (tmp_path / name / "config.json").read_text()


@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_a_model_and_its_tokenizer_push_themselves(bare_hub: StandIn, made: Path, tmp_path: Path, kind: str) -> None:
    """Each keeps what the other sent, and a card that is there stays."""
    source = made if kind == "nf4" else made.parent / "source"
    model, tokenizer = neoquant.load(source, device="cpu")
    sent = model.push_to_hub(MODEL, max_shard_size="20KB", commit_message="Weights")
    assert sent.url == f"{bare_hub.url}/{MODEL}/commit/{COMMIT}" and len(sent.files) > 4
    card = bare_hub.repos[MODEL]["README.md"].decode()
    assert f'neoquant.load("{MODEL}")' in card and ("quantized: nf4 (4 bits)" in card) == (kind == "nf4")
    assert str(tmp_path.parent) not in card
    bare_hub.repos[MODEL]["README.md"] = b"---\nlicense: mit\n---\nMine"
    weights = {name for name in bare_hub.repos[MODEL] if "safetensors" in name}
    tokenizer.push_to_hub(MODEL)
    assert weights < bare_hub.repos[MODEL].keys()
    again = model.push_to_hub(MODEL)
    assert set(again.removed) == weights and "README.md" not in again.files
    assert bare_hub.repos[MODEL]["README.md"].endswith(b"Mine")
    far, far_tokenizer = neoquant.load(MODEL, device="cpu")
    ids = torch.tensor([far_tokenizer.encode("import os")])
    assert ids.tolist() == [tokenizer.encode("import os")]
    assert torch.equal(far(ids).logits, model(ids).logits)


def test_what_pushes_itself_refuses_first(bare_hub: StandIn, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = neoquant.load(made, device="cpu")
    for it in (model, tokenizer):
        with pytest.raises(RequestError, match="'neo' is no name on the hub: expected user/name"):
            it.push_to_hub("neo")
    with pytest.raises(RequestError, match="safe_serialization=False asks for a pickle"):
        model.push_to_hub(MODEL, safe_serialization=False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(made / "none"))
    with pytest.raises(HubError, match="no token: set HF_TOKEN"):
        model.push_to_hub(MODEL)
    assert not bare_hub.log
    assert model.push_to_hub(MODEL, token="hf_secret", private=True).commit == COMMIT
    assert bare_hub.private == {MODEL}
