"""The text of tokens, where some of them are no whole characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from neoquant.tokenizer.byte_level import byte_alphabet

REPLACEMENT = "\ufffd"
LONGEST = 4
"""Bytes of a character in UTF-8, at most: so many tokens may share one."""


class SupportsDecode(Protocol):
    """What is needed of a tokenizer; one that has `convert_ids_to_tokens` as well can show single bytes."""

    def decode(self, ids: list[int]) -> str: ...


def token_texts(ids: Sequence[int], tokenizer: SupportsDecode) -> list[str]:
    """The text of each token; of tokens that share a character, the last one has it, and the others are empty."""
    texts = []
    start = 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[start:end]))
        if text.endswith(REPLACEMENT) and end - start < LONGEST and end < len(ids):
            texts.append("")
        else:
            texts.append(decode_escaped(ids[start:end], tokenizer))
            start = end
    return texts


def decode_escaped(ids: Sequence[int], tokenizer: SupportsDecode) -> str:
    """Tokens as text; bytes that are no UTF-8 by themselves are escaped: `\\xe2\\x80` instead of U+FFFD.

    The bytes come from the vocabulary's entries in the byte-level alphabet of GPT-2 (openai/gpt-2, encoder.py). Where
    the tokenizer does not list its entries, or they are spelled otherwise, U+FFFD stays.
    """
    text = tokenizer.decode(list(ids))
    list_entries = getattr(tokenizer, "convert_ids_to_tokens", None)
    if REPLACEMENT not in text or list_entries is None:
        return text
    letters = "".join(entry or "" for entry in list_entries(list(ids)))
    alphabet = byte_alphabet()
    if not letters or not all(letter in alphabet for letter in letters):
        return text
    return bytes(alphabet[letter] for letter in letters).decode("utf-8", "backslashreplace")
