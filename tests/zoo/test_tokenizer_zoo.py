"""Tokenizer folders of every kind, opened by transformers and by neoquant: the same ids, or an error that says why."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers_4
from tokenizer_folders import EOT, Folder, folders
from transformers_4 import skip_if_otherwise

import neoquant
from neoquant.errors import CheckpointError, NeoquantError

transformers = pytest.importorskip("transformers")

FOLDERS = folders()
EQUAL = [name for name, folder in FOLDERS.items() if folder.error is None]
REFUSED = [name for name, folder in FOLDERS.items() if folder.error is not None]
TEXTS = [
    "hello, robot",
    "",
    " The  library\n\n",
    "Größe: π ≈ 3.14, ﬁn 😀",
    f"<|start|>hello <|user|> robot<|bot|>!{EOT}",
    f"a <l> b <r>  c robots robot [PAD] <|unk|><|end|> {EOT} The",
    "It said : hello , world ! They 're",
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"add_special_tokens": False},
    {"padding": True},
    {"padding": True, "return_tensors": "pt", "padding_side": "left"},
    {"padding": "max_length", "max_length": 12, "pad_to_multiple_of": 8},
    {"truncation": True, "max_length": 4, "return_offsets_mapping": True, "return_special_tokens_mask": True},
    {"max_length": 5},
    {"max_length": 5, "truncation": False},
    {"truncation": True},
    {"return_token_type_ids": True, "text_pair": [text[::-1] for text in TEXTS]},
    {"text_pair": ["robot"] * len(TEXTS), "truncation": True, "max_length": 7},
    {"text_pair": ["read every book"] * len(TEXTS), "truncation": "only_second", "max_length": 40},
]
ATTRIBUTES = ("padding_side", "truncation_side", "model_max_length", "model_input_names", "chat_template")


def ours(folder: Path) -> neoquant.Tokenizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return neoquant.AutoTokenizer.from_pretrained(folder)


def theirs(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def plain(encoding: Any) -> dict[str, Any]:
    return {name: column.tolist() if hasattr(column, "tolist") else column for name, column in encoding.items()}


def tokenized(tokenizer: Any, options: dict[str, Any]) -> Any:
    """What a call gives, or that it is refused."""
    try:
        return plain(tokenizer(TEXTS, **options))
    except (NeoquantError, Exception) as error:  # the libraries raise bare Exception
        return f"refused by {'neoquant' if isinstance(error, NeoquantError) else 'transformers'}"


def require_same(a: Any, b: Any) -> None:
    """Every id, mask, offset and decoded text of two tokenizers is the same."""
    for text in TEXTS:
        assert a(text)["input_ids"] == b(text)["input_ids"], text
        assert a.tokenize(text) == b.tokenize(text)
        ids = a.encode(text)
        for skip in (False, True):
            assert a.decode(ids, skip_special_tokens=skip) == b.decode(ids, skip_special_tokens=skip)
    if a.pad_token is None:
        a.pad_token = b.pad_token = next(iter(a.get_added_vocab()))
    for options in OPTIONS:
        got, expected = tokenized(a, options), tokenized(b, options)
        both_refused = got == "refused by neoquant" and expected == "refused by transformers"
        assert both_refused or got == expected, options


@pytest.mark.parametrize("name", EQUAL)
def test_ids_are_transformers(name: str, tmp_path: Path) -> None:
    skip_if_otherwise(name, transformers_4.TOKENIZERS)
    folder = FOLDERS[name].make(tmp_path / "model")
    a, b = ours(folder), theirs(folder)
    assert len(a) == len(b) and a.vocab_size == b.vocab_size and a.get_vocab() == b.get_vocab()
    assert a.special_tokens_map == b.special_tokens_map
    assert set(a.all_special_tokens) == set(b.all_special_tokens)
    assert [getattr(a, f"{kind}_token_id") for kind in ("bos", "eos", "pad")] == [
        getattr(b, f"{kind}_token_id") for kind in ("bos", "eos", "pad")
    ]
    assert [getattr(a, attribute) for attribute in ATTRIBUTES] == [getattr(b, attribute) for attribute in ATTRIBUTES]
    require_same(a, b)


@pytest.mark.parametrize("name", EQUAL)
def test_each_reads_what_the_other_saved(name: str, tmp_path: Path) -> None:
    skip_if_otherwise(name, transformers_4.TOKENIZERS)
    folder = FOLDERS[name].make(tmp_path / "model")
    a, b = ours(folder), theirs(folder)
    for writer, reader, written in ((a, theirs, tmp_path / "ours"), (b, ours, tmp_path / "theirs"), (a, ours, folder)):
        writer.save_pretrained(written)
        (written / "config.json").write_text('{"model_type": "gpt_neo"}')
        again = reader(written)
        assert again.special_tokens_map == a.special_tokens_map
        assert [getattr(again, which) for which in ATTRIBUTES] == [getattr(a, which) for which in ATTRIBUTES]
        for text in TEXTS:
            assert again(text)["input_ids"] == a(text)["input_ids"]
            assert again.decode(a.encode(text), skip_special_tokens=True) == a.decode(
                a.encode(text), skip_special_tokens=True
            )


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why(name: str, tmp_path: Path) -> None:
    folder = FOLDERS[name].make(tmp_path / "model")
    with pytest.raises(CheckpointError, match=FOLDERS[name].error) as caught:
        ours(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name, folder in FOLDERS.items() if folder.warning])
def test_what_versions_of_transformers_read_differently_is_warned_of(name: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=FOLDERS[name].warning):
        neoquant.AutoTokenizer.from_pretrained(FOLDERS[name].make(tmp_path / "model"))


def test_plain_folders_warn_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, folder in enumerate(FOLDERS.values()):
            if folder.error is None and folder.warning is None:
                neoquant.AutoTokenizer.from_pretrained(folder.make(tmp_path / str(number)))


def test_unknown_keys_are_kept(tmp_path: Path) -> None:
    folder = FOLDERS["fast, unknown keys"].make(tmp_path / "model")
    ours(folder).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert saved["my_own"] == {"kept": [1, 2]} and saved["errors"] == "replace"
    assert saved["model_input_names"] == ["input_ids", "attention_mask"]


def test_there_are_enough_folders() -> None:
    assert transformers_4.TOKENIZERS.keys() <= set(EQUAL)
    assert len(FOLDERS) >= 60 and all(isinstance(folder, Folder) for folder in FOLDERS.values())
