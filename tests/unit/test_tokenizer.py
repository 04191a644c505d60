"""The tokenizer's attributes and methods, held to transformers' on one folder; tests/zoo opens many folders."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli, write_tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

import neoquant
from neoquant.errors import CheckpointError, RequestError

transformers = pytest.importorskip("transformers")

EOT = "<|endoftext|>"
ADDED = ("<|user|>", "<|bot|>", "<|pad|>")
TEXTS = ["hello <|user|>robot", "", " a<|bot|>", f"{EOT} The end"]


def add_to(folder: Path, **config: Any) -> Path:
    """Three added tokens, the last of which pads, and other changes to tokenizer_config.json.

    It names its columns: where none are named, transformers 4 gives token_type_ids as well.
    """
    decoder = {
        str(257 + number): {"content": token, "special": token != "<|bot|>"} for number, token in enumerate(ADDED)
    }
    stated = json.loads((folder / "tokenizer_config.json").read_text())
    stated |= {"added_tokens_decoder": decoder, "pad_token": "<|pad|>", "model_max_length": 1000}
    stated |= {"model_input_names": ["input_ids", "attention_mask"], **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_to(write_tiny_model(tmp_path_factory.mktemp("tokenizer") / "model", vocab_size=262))


@pytest.fixture
def both(folder: Path) -> tuple[neoquant.Tokenizer, Any]:
    return neoquant.AutoTokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([*ADDED, EOT, "a", " ", "é", "\n", "hello", "😀"]), max_size=12).map("".join))
def test_texts_with_added_tokens_are_transformers(text: str) -> None:
    ours, theirs = _pair()
    ids = theirs(text).input_ids
    assert ours(text).input_ids == ours.encode(text) == ids
    for skip in (False, True):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
        assert ours.convert_ids_to_tokens(ids, skip) == theirs.convert_ids_to_tokens(ids, skip)
    assert ours.tokenize(text) == theirs.tokenize(text)
    assert ours.convert_tokens_to_string(ours.tokenize(text)) == theirs.convert_tokens_to_string(theirs.tokenize(text))


_PAIR: list[Any] = []


def _pair() -> Any:
    if not _PAIR:
        import tempfile

        place = add_to(write_tiny_model(Path(tempfile.mkdtemp()) / "model", vocab_size=262))
        _PAIR.extend((neoquant.AutoTokenizer.from_pretrained(place), transformers.AutoTokenizer.from_pretrained(place)))
    return _PAIR


def test_a_special_token_that_is_set_moves_its_id(both: tuple[Any, Any]) -> None:
    for tokenizer in both:
        tokenizer.eos_token = "<|bot|>"
        assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (258, 0)
        tokenizer.pad_token_id = 257
        assert tokenizer.pad_token == "<|user|>"
        tokenizer.bos_token = None
        assert tokenizer.bos_token is None and tokenizer.bos_token_id is None
        assert tokenizer(["a", "bc"], padding=True)["input_ids"][0][1] == 257
    assert both[0].special_tokens_map == both[1].special_tokens_map
    ours = both[0]
    ours.eos_token = "<|none|>"
    with pytest.raises(RequestError, match=r"eos_token is '<\|none\|>', which is no token"):
        _ = ours.eos_token_id
    with pytest.raises(RequestError, match="pad_token_id is 5000; this tokenizer's ids are 0 to 259"):
        ours.pad_token_id = 5000
    with pytest.raises(RequestError, match="pad_token is 5; legal is a token's text"):
        ours.pad_token = 5


def test_attributes_that_nothing_reads_cannot_be_set(both: tuple[Any, Any]) -> None:
    ours = both[0]
    for name in ("truncation", "pad_tokn", "eos_tokens", "add_space"):
        with pytest.raises(AttributeError, match=f"no setting '{name}': nothing would read it"):
            setattr(ours, name, True)
    for name in ("add_prefix_space", "vocab_size", "sha256"):
        with pytest.raises(AttributeError, match=f"a tokenizer's {name} cannot be set"):
            setattr(ours, name, 1)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = ours.nothing
    for name, value in (("padding_side", "up"), ("truncation_side", 1), ("model_max_length", 0)):
        with pytest.raises(RequestError, match=f"{name} is {value!r}; legal"):
            setattr(ours, name, value)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_ends_that_are_set_are_added(both: tuple[Any, Any], bos: bool, eos: bool) -> None:
    if transformers.__version__.startswith("4."):
        pytest.skip("PreTrainedTokenizerFast of transformers 4 takes no add_bos_token once it is loaded")
    for tokenizer in both:
        tokenizer.bos_token = "<|user|>"
        tokenizer.add_bos_token, tokenizer.add_eos_token = bos, eos
    ours, theirs = both
    assert ours.add_bos_token == bos and ours.add_eos_token == eos
    assert ours.num_special_tokens_to_add() == theirs.num_special_tokens_to_add() == bos + eos
    for options in ({}, {"add_special_tokens": False}, {"text_pair": TEXTS, "max_length": 7}):
        assert dict(ours(TEXTS, **options)) == dict(theirs(TEXTS, **options))
    assert ours.prompt_ids("") == ([257] * bos + [0] * eos or [257])


def test_encode_takes_transformers_options(both: tuple[Any, Any]) -> None:
    ours, theirs = both
    options: list[dict[str, Any]] = [
        {"max_length": 3}, {"truncation": True, "max_length": 2}, {"text_pair": "more", "add_special_tokens": False},
        {"padding": "max_length", "max_length": 20},
    ]  # fmt: skip
    for asked in options:
        assert ours.encode("hello", **asked) == theirs.encode("hello", **asked)
    assert torch.equal(ours.encode("hello", return_tensors="pt"), theirs.encode("hello", return_tensors="pt"))
    assert ours.encode_batch(TEXTS, add_special_tokens=False) == [theirs.encode(text) for text in TEXTS]


def test_tokens_and_ids_are_transformers(both: tuple[Any, Any]) -> None:
    ours, theirs = both
    for tokens in (["a", "<|bot|>", "no such"], "<|user|>", "no such"):
        assert ours.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)
    assert ours.convert_ids_to_tokens(258) == theirs.convert_ids_to_tokens(258) == "<|bot|>"
    assert ours.get_vocab() == theirs.get_vocab() and ours.get_added_vocab() == theirs.get_added_vocab()
    assert (len(ours), ours.vocab_size) == (len(theirs), theirs.vocab_size) == (260, 257)
    assert set(ours.all_special_ids) == set(theirs.all_special_ids)


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
def test_rows_of_ids_become_rows_of_text(both: tuple[Any, Any], kind: Callable[[Any], Any]) -> None:
    ours, theirs = both
    rows = [[40, 41, 257], [42, 0, 43]]
    for skip in (False, True):
        assert ours.decode(kind(rows), skip) == theirs.batch_decode(kind(rows), skip_special_tokens=skip)
        assert ours.batch_decode(kind(rows), skip_special_tokens=skip) == ours.decode(kind(rows), skip)
        assert ours.decode(kind(rows[0]), skip) == theirs.decode(kind(rows[0]), skip_special_tokens=skip)
    assert ours.decode(40) == ours.decode(torch.tensor(40)) == theirs.decode(40)
    assert ours.decode([]) == theirs.decode([]) == "" and ours.batch_decode([]) == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_encodings_are_padded_afterwards(both: tuple[Any, Any], side: str) -> None:
    ours, theirs = both
    ours.padding_side = theirs.padding_side = side
    encoded = [ours(text) for text in TEXTS]
    for options in ({}, {"padding": "max_length", "max_length": 20}, {"pad_to_multiple_of": 8}, {"padding": False}):
        expected = theirs.pad([dict(theirs(text)) for text in TEXTS], **options)
        assert dict(ours.pad(encoded, **options)) == dict(expected)
        together = {"input_ids": [theirs(text).input_ids for text in TEXTS]}
        assert dict(ours.pad(together, **options)) == dict(theirs.pad(dict(together), **options))
    tensors = ours.pad(encoded, return_tensors="pt")
    assert torch.equal(tensors.input_ids, theirs.pad([dict(e) for e in encoded], return_tensors="pt").input_ids)
    single = dict(ours.pad(ours("ab"), padding="max_length", max_length=4))
    assert single == dict(theirs.pad(theirs("ab"), padding="max_length", max_length=4))
    with pytest.raises(RequestError, match="nothing to pad: the encoding has attention_mask, but no input_ids"):
        ours.pad({"attention_mask": [[1]]})


def test_tokens_that_are_added_are_saved(both: tuple[Any, Any], tmp_path: Path) -> None:
    for tokenizer in both:
        assert tokenizer.add_special_tokens({"sep_token": "<sep>", "bos_token": "<|user|>"}) == 1
        assert tokenizer.add_tokens(["<new>", "<|bot|>"]) == 1
        assert tokenizer("a<sep><new>")["input_ids"][-2:] == [260, 261]
    ours = both[0]
    ours.padding_side, ours.truncation_side, ours.chat_template = "left", "left", "{{ x }}"
    ours.save_pretrained(tmp_path)
    for read in (neoquant.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        again = read.from_pretrained(tmp_path)
        assert again("a<sep><new>").input_ids[-2:] == [260, 261]
        assert (again.sep_token, again.bos_token_id, again.eos_token_id) == ("<sep>", 257, 0)
        assert (again.padding_side, again.truncation_side, again.chat_template) == ("left", "left", "{{ x }}")
    with pytest.raises(RequestError, match="'eos' is no name of a special token; legal are bos_token"):
        ours.add_special_tokens({"eos": "<eos>"})


def test_settings_come_before_the_files(folder: Path) -> None:
    asked = {"pad_token": EOT, "padding_side": "left", "model_max_length": 3, "bos_token": "<|bot|>"}
    ours = neoquant.AutoTokenizer.from_pretrained(folder, use_fast=True, **asked)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, **asked)
    assert dict(ours(TEXTS, padding=True, truncation=True)) == dict(theirs(TEXTS, padding=True, truncation=True))
    assert ours.special_tokens_map == theirs.special_tokens_map
    with pytest.raises(RequestError, match="a tokenizer has no setting 'pad'; it has bos_token"):
        neoquant.AutoTokenizer.from_pretrained(folder, pad=True)


def test_copies_are_whole(both: tuple[Any, Any]) -> None:
    for again in (copy.deepcopy(both[0]), pickle.loads(pickle.dumps(both[0]))):
        assert again.sha256 == both[0].sha256 and dict(again(TEXTS)) == dict(both[0](TEXTS))
        again.pad_token = EOT
        assert both[0].pad_token == "<|pad|>"


def test_the_hash_tells_what_changes_ids(both: tuple[Any, Any]) -> None:
    ours = both[0]
    found = [ours.sha256]
    ours.padding_side, ours.truncation_side, ours.pad_token, ours.model_max_length = "left", "left", EOT, 7
    ours.chat_template = "{{ x }}"
    ours(TEXTS, truncation=True, padding=True)
    assert ours.sha256 == found[0]
    ours.add_tokens(["<new>"])
    found.append(ours.sha256)
    ours.eos_token = "<|bot|>"
    found.append(ours.sha256)
    ours.add_bos_token = True
    found.append(ours.sha256)
    ours.split_special_tokens = True
    found.append(ours.sha256)
    assert len(set(found)) == 5


def test_the_hash_of_a_plain_folder_is_its_files(tiny_model: Path) -> None:
    """Results and interrupted runs are told apart by it, so it stays what it was."""
    import hashlib

    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    expected = hashlib.sha256(backend.to_str().encode()).hexdigest()
    assert neoquant.AutoTokenizer.from_pretrained(tiny_model).sha256 == expected


def test_files_that_are_damaged_are_named(make_model: Callable[..., Path]) -> None:
    for number, (name, text, message) in enumerate(
        (
            (
                "tokenizer_config.json",
                "[1]",
                "tokenizer_config.json holds JSON of type list, where an object is needed",
            ),
            ("tokenizer_config.json", '{"added_tokens_decoder": []}', "added_tokens_decoder is .*; legal is an object"),
            ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}', "'x' is no token id"),
            ("tokenizer_config.json", '{"tokenizer_class": 5}', "tokenizer_class is 5"),
            ("tokenizer_config.json", '{"model_input_names": ["ids"]}', "model_input_names is .*legal is a list"),
            ("tokenizer_config.json", '{"add_prefix_space": "yes"}', "add_prefix_space is 'yes'; legal is a bool"),
            ("special_tokens_map.json", "{", "special_tokens_map.json is not readable as JSON"),
            ("tokenizer.json", '{"added_tokens": 2}', "tokenizer.json: added_tokens is 2; legal is a list"),
            ("tokenizer.json", '{"added_tokens": "1e-05"}', "added_tokens is '1e-05'; legal is a list"),
            ("tokenizer.json", '{"added_tokens": ["a"]}', "an added token is 'a'; legal is an object with id"),
            ("tokenizer.json", '{"model": {"vocab": {"a": 2147483648}}}', "'a' has the id 2147483648; legal is"),
            ("tokenizer.json", '{"added_tokens": [{"id": 1e99, "content": "a"}]}', r"1e\+99 is no token id"),
            ("added_tokens.json", '{"<|a|>": 2147483648}', "2147483648 is no token id; legal is an integer of 0 to"),
            ("tokenizer.json", "{}", "tokenizer.json .*GPT2Tokenizer is BPE|cannot be read as a tokenizer"),
        )
    ):
        folder = make_model(f"model{number}")
        (folder / name).write_text(text)
        with pytest.raises(CheckpointError, match=message):
            neoquant.AutoTokenizer.from_pretrained(folder)


def test_evaluation_reads_the_folders_ids(tmp_path: Path, cli: Cli) -> None:
    """Rolling losses of a text with added tokens, by transformers' ids and model; a template adds nothing to it."""
    folder = add_to(write_tiny_model(tmp_path / "model", vocab_size=262, dtype="float32"))
    state = json.loads((folder / "tokenizer.json").read_text())
    begin = {"SpecialToken": {"id": EOT, "type_id": 0}}
    parts = [begin, {"Sequence": {"id": "A", "type_id": 0}}]
    state["post_processor"] = {
        "type": "TemplateProcessing",
        "single": parts,
        "pair": [*parts, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {EOT: {"id": EOT, "ids": [0], "tokens": [EOT]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(state))
    text = "<|user|>hello, robot<|bot|>hello<|endoftext|>"
    (tmp_path / "here" / "text.txt").write_text(text)
    result = cli("eval", folder, "--data", "text.txt", "--protocol", "rolling", "--json", "out.json")
    assert result.code == 0, result.err
    total = json.loads((tmp_path / "here" / "out.json").read_text())["total"]

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
    ids = tokenizer(text).input_ids  # the template puts there what the protocol begins with
    assert ids[0] == tokenizer.eos_token_id and 257 in ids and 258 in ids
    with torch.no_grad():
        scores = model(torch.tensor([ids[:-1]])).logits.log_softmax(-1)[0]
    nats = -scores.gather(-1, torch.tensor(ids[1:])[:, None]).sum().item()
    assert total["tokens"] == len(ids) - 1
    assert total["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-4)


def test_quantized_folders_carry_the_tokenizer(tmp_path: Path, cli: Cli) -> None:
    folder = add_to(write_tiny_model(tmp_path / "model", vocab_size=262))
    (folder / "special_tokens_map.json").write_text('{"mask_token": "<|bot|>"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert cli("quantize", folder, "--bits", "8", "--type", "int8", "--out", tmp_path / "int8").code == 0
    ours, source = (neoquant.AutoTokenizer.from_pretrained(place) for place in (tmp_path / "int8", folder))
    assert ours.sha256 == source.sha256 and ours.special_tokens_map == source.special_tokens_map
    assert ours.chat_template == "{{ messages }}"
    shown = cli("generate", tmp_path / "int8", "-p", "<|user|>hello", "--greedy", "--max-new-tokens", "2")
    assert shown.code == 0 and shown.out.startswith("<|user|>hello")


def test_streams_skip_every_special_token(both: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for streamer, tokenizer in ((neoquant.TextStreamer, both[0]), (transformers.TextStreamer, both[1])):
        out = streamer(tokenizer, skip_special_tokens=True)
        out.put(torch.tensor([both[1](f"<|user|>hello<|bot|>{EOT}").input_ids]))
        out.end()
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] == "hello<|bot|>\n"


def test_an_empty_prompt_needs_a_token_to_begin_with(folder: Path, tmp_path: Path) -> None:
    tokenizer = neoquant.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.prompt_ids("") == [0]
    tokenizer.bos_token = None
    with pytest.raises(RequestError, match="the prompt is empty, and the tokenizer has no bos_token"):
        tokenizer.prompt_ids("")


def test_the_bundled_tokenizer_names_its_inputs() -> None:
    """transformers 4 gives token_type_ids where a fast tokenizer is silent, and GPT-Neo would add their embeddings."""
    from neoquant.demo import MODEL

    stated = json.loads((Path(MODEL) / "tokenizer_config.json").read_text())
    assert stated["model_input_names"] == ["input_ids", "attention_mask"]
