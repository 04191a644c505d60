"""Tokens as text: every character once, and bytes that are none as bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from byte_tokenizer import Bytes
from tokenizers.decoders import ByteLevel as Decoder
from tokenizers.pre_tokenizers import ByteLevel

from neoquant.evaluation.token_text import decode_escaped, token_texts
from neoquant.tokenizer.byte_level import byte_alphabet
from neoquant.tokenizer.tokenizer import Tokenizer


def test_a_character_stands_where_it_ends() -> None:
    text = "aé漢😀\ufffdz"
    found = token_texts(Bytes().encode(text), Bytes())
    assert "".join(found) == text and found[1:3] == ["", "é"]
    assert len(found) == len(text.encode())
    cut = Bytes().encode("x😀")[:3]
    assert "".join(token_texts(cut, Bytes())).startswith("x")


def test_the_alphabet_is_that_of_tokenizers() -> None:
    alphabet = byte_alphabet()
    assert set(alphabet) == set(ByteLevel.alphabet()) and sorted(alphabet.values()) == list(range(256))
    for letter, byte in alphabet.items():
        assert Decoder().decode([letter]) == bytes([byte]).decode("utf-8", "replace")


@pytest.mark.parametrize("text", ["", "plain", "é", "漢", "😀 x", "\ufffd"])
def test_whole_characters_are_not_escaped(tiny_model: Path, text: str) -> None:
    tokenizer = Tokenizer.from_pretrained(tiny_model)
    assert decode_escaped(tokenizer.encode(text), tokenizer) == text


def test_single_bytes_are_escaped(tiny_model: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(tiny_model)
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    known = [(byte, tokenizer.backend.token_to_id(letters[byte])) for byte in range(0x80, 0x100)]
    assert any(token is not None for _, token in known)
    for byte, token in known:
        if token is not None:
            assert decode_escaped([token], tokenizer) == f"\\x{byte:02x}"


def test_without_a_vocabulary_the_replacement_character_stays() -> None:
    assert decode_escaped([0xE2 + 1], Bytes()) == "\ufffd"
