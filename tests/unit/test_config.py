"""`config.json` in, `config.json` out: what transformers writes is read, and what we write transformers reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from neoquant.errors import ConfigError
from neoquant.model.config import GPTNeoConfig


def test_defaults_are_gpt_neo_1p3b() -> None:
    config = GPTNeoConfig()
    assert (config.num_layers, config.hidden_size, config.head_dim, config.inner_size) == (24, 2048, 128, 8192)
    assert config.attention_layers == ["global", "local"] * 12


def test_round_trip_keeps_everything_unknown_keys_included() -> None:
    values = {"model_type": "gpt_neo", "hidden_size": 64, "num_heads": 4, "gradient_checkpointing": True}
    values |= {"summary_type": "cls_index", "id2label": {"0": "no", "1": "yes", "2": "perhaps"}}
    config = GPTNeoConfig.from_dict(values)
    assert config.num_labels == 3
    again = config.to_dict()
    assert all(again[key] == value for key, value in values.items())
    assert GPTNeoConfig.from_dict(again) == config


def test_transformers_reads_what_we_write(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = GPTNeoConfig(
        vocab_size=11, hidden_size=12, num_heads=3, num_layers=3, attention_types=[[["global"], 1], [["local"], 2]],
        window_size=4, intermediate_size=5, eos_token_id=3, bos_token_id=2, pad_token_id=1, num_labels=5,
    )  # fmt: skip
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.attention_layers == ours.attention_layers
    for key in ("hidden_size", "num_heads", "window_size", "intermediate_size", "eos_token_id", "pad_token_id"):
        assert getattr(theirs, key) == getattr(ours, key)
    assert theirs.num_labels == 5
    theirs.save_pretrained(tmp_path / "back")
    back = GPTNeoConfig.from_pretrained(tmp_path / "back")
    assert {**back.to_dict(), "dtype": None} | ours.to_dict() == {**back.to_dict(), "dtype": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; legal is \"gpt_neo\""),
        ({"num_layers": 7}, "describes 24 layers .* num_layers is 7"),
        ({"num_heads": 5}, "num_heads is 5; legal is a divisor of .*2048"),
        ({"attention_types": [[["global", "sparse"], 12]]}, "holds sparse; legal are global, local"),
        ({"attention_types": "global"}, "legal is a list"),
        (
            {"attention_layers": ["global"] * 24, "attention_types": [[["global", "local"], 12]]},
            "attention_layers is .* attention_types gives",
        ),
        ({"window_size": 0}, "window_size is 0; legal is an integer of 1 to"),
        ({"hidden_size": 2048.0}, "hidden_size is 2048.0"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"activation_function": "gelu_fast"}, "activation_function is 'gelu_fast'; legal is one of gelu_new"),
        ({"num_layers": "two"}, "num_layers is 'two'"),
        ({"architectures": float("inf")}, "architectures is inf; legal is null or a list of names"),
        ({"architectures": ["GPTNeoModel", 1]}, "architectures is .* legal is null or a list of names"),
        ({"id2label": ["a", "b"]}, "id2label is .*; legal is null or an object"),
        ({"num_layers": 0, "attention_types": []}, "num_layers is 0; legal is an integer of 1 to"),
    ],
)
def test_what_is_illegal_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GPTNeoConfig.from_dict(change)


def test_null_means_not_said_except_where_it_is_a_value() -> None:
    config = GPTNeoConfig.from_dict({"window_size": None, "intermediate_size": None, "eos_token_id": None})
    assert (config.window_size, config.intermediate_size, config.eos_token_id) == (256, None, None)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    for text, message in (("{", "not JSON"), ("[" * 9**5, "nested too deeply"), ("[1]", "holds JSON of type list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            GPTNeoConfig.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        GPTNeoConfig.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 24, "torch_dtype": "float16"}))
    assert GPTNeoConfig.from_pretrained(tmp_path).dtype == "float16"


@pytest.mark.parametrize(
    "layers",
    [["global"], ["global", "local"] * 3, ["local", "local", "global"], ["global"] * 5, ["local", "global", "local"]],
)
def test_one_word_a_layer_is_enough(layers: list[str]) -> None:
    config = GPTNeoConfig.from_dict({"num_layers": len(layers), "attention_layers": layers})
    assert config.attention_layers == layers
    assert GPTNeoConfig.from_dict(config.to_dict()) == config
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPTNeoConfig(num_layers=len(layers), attention_types=config.attention_types)
    assert theirs.attention_layers == layers


NAMES = {"id2label": {"0": "no", "1": "yes", "2": "perhaps"}, "label2id": {"no": 0, "yes": 1, "perhaps": 2}}


@pytest.mark.parametrize("named", [{}, NAMES, {"num_labels": 3}])
def test_attributes_are_transformers(tmp_path: Path, named: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    values = {"model_type": "gpt_neo", "hidden_size": 64, "num_heads": 4, "mine": [1], **named}
    (tmp_path / "config.json").write_text(json.dumps(values))
    ours, theirs = GPTNeoConfig.from_pretrained(tmp_path), transformers.GPTNeoConfig.from_pretrained(tmp_path)
    names = ("model_type", "num_hidden_layers", "num_attention_heads", "id2label", "label2id", "num_labels", "mine")
    for config in (ours, theirs):
        config.later = "set"
        config.num_attention_heads = 8
    assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]
    assert (ours.num_heads, ours.later) == (8, "set") and not hasattr(ours, "nothing")
    assert ours.get_text_config() is ours and theirs.get_text_config() is theirs
    assert ours.is_encoder_decoder is theirs.is_encoder_decoder is False
    for config in (ours, theirs):
        config.num_labels = 5
    assert GPTNeoConfig.from_dict(ours.to_dict()).id2label == ours.id2label
    ours.save_pretrained(tmp_path / "out")
    again = transformers.GPTNeoConfig.from_pretrained(tmp_path / "out")
    assert (again.num_labels, again.later, again.num_heads) == (5, "set", 8)
    ours.id2label = {0: "a", 1: "b"}
    assert (ours.num_labels, ours.label2id) == (2, {"a": 0, "b": 1})


def test_other_keywords_are_config_jsons_keys_as_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    values = {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "n_embd": 37,
        "architectures": ["GPTNeoModel"],
        "attention_types": [[["global", "local"], 1]], "id2label": {"0": "a", "1": "b", "2": "c"},
    }  # fmt: skip
    ours, theirs = GPTNeoConfig(**values, model_type="gpt_neo"), transformers.GPTNeoConfig(**values)
    for name in ("num_layers", "num_heads", "n_embd", "architectures", "num_labels", "id2label", "attention_layers"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.to_dict() == GPTNeoConfig.from_dict(values).to_dict()
    with pytest.raises(ConfigError, match="model_type"):
        GPTNeoConfig(model_type="gpt2", hidden_size=24)
    ours.to_json_file(tmp_path / "said.json")
    stated = json.loads((tmp_path / "said.json").read_text())
    assert stated["n_embd"] == 37 and "vocab_size" not in stated and "window_size" not in stated
    assert GPTNeoConfig.from_json_file(tmp_path / "said.json") == ours == GPTNeoConfig(**ours.to_diff_dict())
    assert transformers.GPTNeoConfig.from_json_file(tmp_path / "said.json").hidden_size == 24
    assert json.loads(ours.to_json_string(use_diff=False)) == json.loads(json.dumps(ours.to_dict()))
