"""Texts behind which a continuation ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from neoquant.errors import RequestError
from neoquant.generation.generate import Stop
from neoquant.tokenizer.byte_level import byte_alphabet
from neoquant.tokenizer.tokenizer import Tokenizer


class StopStrings:
    """Ends a row behind the token that completes one of `strings`, as transformers' StopStringCriteria does.

    A string may begin in the prompt, and its last token may reach beyond it. One that was complete before the last
    token ends nothing.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Tokenizer) -> None:
        self._strings = [string.encode() for string in strings]
        self._tokenizer = tokenizer
        self._longest = max(map(len, self._strings))  # in tokens, too: each holds a byte at least
        self._bytes: dict[int, bytes] = {}

    def __call__(self, ids: Tensor, keep: Tensor | None) -> Tensor:
        """Whether each row of `ids[B, S]` ends with its last token, bool `[B]`; `keep[B, S]` is False on padding."""
        rows = ids[:, -self._longest :].tolist()
        kept = [[True] * len(row) for row in rows] if keep is None else keep[:, -self._longest :].tolist()
        pairs = zip(rows, kept, strict=True)
        return torch.tensor([self._ends([i for i, held in zip(*pair, strict=True) if held]) for pair in pairs])

    def _ends(self, ids: list[int]) -> bool:
        text, last = b"".join(map(self._spell, ids)), len(self._spell(ids[-1]))
        return any(text.find(string, max(0, len(text) - last - len(string) + 1)) >= 0 for string in self._strings)

    def _spell(self, token: int) -> bytes:
        """The bytes of a token, which may end in the middle of a character."""
        if token not in self._bytes:
            letters = self._tokenizer.convert_ids_to_tokens([token])[0] or ""
            byte_of = byte_alphabet()
            spelled = bytes(byte_of[letter] for letter in letters if letter in byte_of)
            whole = len(spelled) == len(letters)
            self._bytes[token] = spelled if whole else self._tokenizer.decode([token]).encode()
        return self._bytes[token]


def ends_with(strings: Sequence[str], tokenizer: Tokenizer | None) -> Stop | None:
    """`StopStrings`; None where there are none. Raises RequestError for an empty one, or without a tokenizer."""
    if not strings:
        return None
    if tokenizer is None:
        raise RequestError("stop_strings are looked for in text: pass tokenizer=... with them")
    if not all(strings):
        raise RequestError("stop_strings holds an empty text, which every text ends with")
    return StopStrings(strings, tokenizer)


def ends_by(stop: Stop | None, criteria: Sequence[Callable[..., Any]] | None) -> Stop | None:
    """`stop`, and transformers' stopping criteria beside it: each is called with all ids `[B, S]` and None."""
    if not criteria:
        return stop

    def ends(ids: Tensor, keep: Tensor | None) -> Tensor:
        ended = torch.zeros(len(ids), dtype=torch.bool) if stop is None else stop(ids, keep)
        for criterion in criteria:
            ended = ended | torch.as_tensor(criterion(ids, None)).cpu()  # one answer, or one of each row
        return ended

    return ends
