"""Hashes that tell texts apart: of one document, and of all texts of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def fingerprint(text: str) -> str:
    """By which a document is known again: 16 hex digits of the SHA-256 of its whole text, but for space around it."""
    return hashlib.sha256(text.strip().encode("utf-8", "surrogatepass")).hexdigest()[:16]


def hash_texts(texts: Sequence[str]) -> str:
    """SHA-256 of the texts in order, a zero byte after each."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
