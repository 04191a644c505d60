"""What people write for transformers' tokenizers: done as there, or answered with the way to do it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import write_tokenizer

from neoquant import RequestError
from neoquant.tokenizer.tokenizer import Tokenizer

TEXTS = [
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Two roads diverged.",
    "été, naïve <|endoftext|> ab",
] * 30


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def both(folder: Path) -> tuple[Tokenizer, Any]:
    transformers = pytest.importorskip("transformers")
    return Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("renamed", [None, {"<|endoftext|>": "<end>"}])
@pytest.mark.parametrize("new", [None, ["<user>"]])
def test_a_vocabulary_is_trained_as_transformers_does(
    both: tuple[Tokenizer, Any], tmp_path: Path, renamed: dict[str, str] | None, new: list[str] | None
) -> None:
    ours, theirs = (
        each.train_new_from_iterator(
            iter([TEXTS[:40], TEXTS[40:]]), 300, new_special_tokens=new, special_tokens_map=renamed
        )
        for each in both
    )
    left = dict.fromkeys(renamed or ())  # transformers adds former tokens again, which nothing is called by
    assert ours.get_vocab() == {token: number for token, number in theirs.get_vocab().items() if token not in left}
    assert len(ours) <= 300
    assert ours.eos_token == theirs.eos_token == (renamed or {}).get("<|endoftext|>", "<|endoftext|>")
    texts = [*TEXTS[: 2 if renamed else 3], "something <user> else <end>"]
    assert [ours(text).input_ids for text in texts] == [theirs(text).input_ids for text in texts]
    ours.save_pretrained(tmp_path / "saved")
    again = Tokenizer.from_pretrained(tmp_path / "saved")
    assert [again(text).input_ids for text in texts] == [ours(text).input_ids for text in texts]
    assert ours.decode(ours("values").input_ids) == "values"
    before = both[0].get_vocab()
    assert before == Tokenizer.from_pretrained(tmp_path / "tokenizer").get_vocab(), "the former one is as it was"


def test_a_template_takes_its_tokens_along(folder: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(folder, add_bos_token=True)
    made = tokenizer.train_new_from_iterator(TEXTS, 280, special_tokens_map={"<|endoftext|>": "<begin>"})
    assert made("ab").input_ids[0] == made.bos_token_id == made.convert_tokens_to_ids("<begin>")
    with pytest.raises(RequestError, match=r"no option 'minimum': legal are .*min_frequency"):
        tokenizer.train_new_from_iterator(TEXTS, 280, minimum=2)
    with pytest.raises(RequestError, match="no vocabulary of -1 tokens can be trained"):
        tokenizer.train_new_from_iterator(TEXTS, -1)


def test_a_token_may_begin_with_a_dollar(folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(folder, bos_token="$$$", add_bos_token=True)
    assert tokenizer("ab").input_ids == [
        tokenizer.convert_tokens_to_ids("$$$"),
        *tokenizer("ab", add_special_tokens=False).input_ids,
    ]
    tokenizer.save_pretrained(tmp_path / "saved")
    assert Tokenizer.from_pretrained(tmp_path / "saved")("ab", "c").input_ids == tokenizer("ab", "c").input_ids


def test_special_tokens_are_split_where_asked(both: tuple[Tokenizer, Any]) -> None:
    ours, theirs = both
    text = "ab<|endoftext|>cd"
    for split in (True, False, None):
        options = {} if split is None else {"split_special_tokens": split}
        assert ours(text, **options).input_ids == theirs(text, **options).input_ids
        assert ours.encode(text, **options) == theirs.encode(text, **options)
    assert ours.tokenize(text, split_special_tokens=True) == theirs.tokenize(text, split_special_tokens=True)
    assert ours(text).input_ids == theirs(text).input_ids, "the call's option has gone with it"


def test_places_of_words_are_transformers(both: tuple[Tokenizer, Any]) -> None:
    texts = ["Two roads diverged", "a é b"]
    ours, theirs = (each(texts) for each in both)
    assert ours.words(0) == theirs.word_ids(0)
    for row, text in enumerate(texts):
        for place in range(len(ours.input_ids[row])):
            for name in ("token_to_word", "token_to_chars", "token_to_sequence"):
                assert getattr(ours, name)(row, place) == getattr(theirs, name)(row, place)
        for word in range(3):
            for name in ("word_to_tokens", "word_to_chars"):
                assert getattr(ours, name)(row, word) == getattr(theirs, name)(row, word)
        for place in range(len(text)):
            for name in ("char_to_word", "char_to_token"):
                assert getattr(ours, name)(row, place) == getattr(theirs, name)(row, place)
    span = both[0]("Two roads").word_to_tokens(1)
    assert span is not None and span.end - span.start >= 1 and both[0]("").word_to_tokens.__self__.input_ids == []


def test_files_by_transformers_names(folder: Path, tmp_path: Path) -> None:
    expected = Tokenizer.from_pretrained(folder)
    by_file = Tokenizer(tokenizer_file=folder / "tokenizer.json")
    by_object = Tokenizer(tokenizer_object=Tokenizer.from_pretrained(folder).backend)
    for made in (by_file, by_object):
        assert made(TEXTS[2]).input_ids == expected(TEXTS[2]).input_ids


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        (lambda t: t.prepare_for_model([1]), "no 'prepare_for_model' here: .*call the tokenizer"),
        (lambda t: t.build_inputs_with_special_tokens([1]), "add_special_tokens=True"),
        (lambda t: t("ab", truncate=True), "no option 'truncate': truncation=True"),
        (lambda t: t("ab", max_target_length=3), "no option 'max_target_length': call it twice"),
        (lambda t: t.tokenize("ab", add_prefix_space=True), r"from_pretrained\(..., add_prefix_space=True\)"),
        (lambda t: t("ab", nonsense=True), "no option 'nonsense': legal are add_special_tokens, "),
        (lambda t: t.save_pretrained("x", legacy_format=True), "tokenizer.json is written"),
        (lambda t: t.add_special_tokens({"additional_special_tokens": "<a>"}), "legal is a list of tokens"),
    ],
)  # fmt: skip
def test_what_is_not_here_is_answered(folder: Path, call: Any, answer: str) -> None:
    with pytest.raises(RequestError, match=answer):
        call(Tokenizer.from_pretrained(folder))


def test_what_is_not_here_is_not_there(folder: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(folder)
    assert not hasattr(tokenizer, "prepare_for_model") and not hasattr(tokenizer, "nonsense")
    tokenizer.save_pretrained(folder, legacy_format=False, filename_prefix=None)
