"""The alphabet of byte-level vocabularies: a printable letter for each byte (GPT-2; openai/gpt-2, encoder.py)."""

from __future__ import annotations

from functools import cache


@cache
def byte_alphabet() -> dict[str, int]:
    """Letter -> byte: printable Latin-1 stands for itself, the other bytes for U+0100 and what follows."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
