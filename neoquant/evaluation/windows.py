"""Cutting a sequence of tokens into the windows that a model reads: three protocols, pure functions of lengths.

A span `(start, end, scored)` means: the model reads `ids[start:end - 1]` and is scored on its predictions of
`ids[end - scored:end]`. Every protocol scores each token that it scores exactly once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class WindowSpan(NamedTuple):
    start: int
    end: int
    scored: int


def rolling(length: int, context: int) -> Iterator[WindowSpan]:
    """Spans over an end-of-text token and a document's tokens, `length` in all; everything but the first is scored.

    Disjoint stretches of `context` predictions, each of whose windows starts at the token before its stretch; the last,
    shorter stretch is given as much context as fits. (lm-evaluation-harness, rolling loglikelihood.)
    """
    for done in range(1, length, context):
        end = min(done + context, length)
        yield WindowSpan(max(0, end - 1 - context), end, end - done)


def joined(length: int, context: int) -> Iterator[WindowSpan]:
    """Disjoint windows of `context` tokens; a window's first token is never scored, a shorter tail is dropped.

    (Frantar et al., 2022, GPTQ, section 4; the code that its followers evaluate with.)
    """
    for start in range(0, length - context + 1, context):
        yield WindowSpan(start, start + context, context - 1)


def strided(length: int, context: int, stride: int) -> Iterator[WindowSpan]:
    """Windows of `context` tokens that start every `stride`; only tokens that no earlier window scored are scored.

    The very first token is never scored: nothing precedes it. (Hugging Face, "Perplexity of fixed-length models".)
    """
    done = 1
    for start in range(0, length, stride):
        end = min(start + context, length)
        if end > done:
            yield WindowSpan(start, end, end - done)
        done = end
        if end == length:
            break
