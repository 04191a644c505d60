"""A tokenizer for tests: token n + 1 is byte n, token 0 ends a text."""

from __future__ import annotations


class Bytes:
    sha256 = "bytes"
    eos_token_id: int | None = 0

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [byte + 1 for byte in text.encode()]

    def decode(self, ids: list[int]) -> str:
        return bytes(i - 1 for i in ids if i).decode("utf-8", "replace")
