"""Windows: which tokens are read, which are scored."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from neoquant.evaluation.windows import WindowSpan, joined, rolling, strided

lengths = st.integers(0, 300)
contexts = st.integers(2, 40)


def scored(spans: Iterable[WindowSpan]) -> list[int]:
    return [position for span in spans for position in range(span.end - span.scored, span.end)]


@settings(deadline=None)
@given(lengths, contexts)
def test_rolling_scores_every_token_but_the_first_once(length: int, context: int) -> None:
    spans = list(rolling(length, context))
    assert scored(spans) == list(range(1, length))
    for span in spans:
        read = span.end - 1 - span.start
        assert span.start >= 0 and span.scored <= read <= context


@settings(deadline=None)
@given(st.integers(1, 300), contexts)
def test_rolling_cuts_as_lm_evaluation_harness_defines(tokens: int, context: int) -> None:
    """Its definition, in its terms: a first window after the prefix, then windows of `context` predictions, each read
    with one token of context, but a full window's worth for the last."""
    text = list(range(1, tokens + 1))
    expected = [([0, *text][: min(context, tokens)], text[:context])]
    for done in range(context, tokens, context):
        end = min(done + context, tokens)
        expected.append((text[end - context - 1 : end - 1], text[done:end]))
    ids = [0, *text]
    spans = rolling(len(ids), context)
    assert [(ids[s.start : s.end - 1], ids[s.end - s.scored : s.end]) for s in spans] == expected


@settings(deadline=None)
@given(lengths, contexts)
def test_joined_windows_are_disjoint_and_full(length: int, context: int) -> None:
    spans = list(joined(length, context))
    assert len(spans) == length // context
    assert scored(spans) == [p for p in range(length // context * context) if p % context]
    assert all(span.start % context == 0 and span.end - span.start == context for span in spans)


@settings(deadline=None)
@given(lengths, contexts, st.data())
def test_strided_scores_every_token_but_the_first_once(length: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context - 1))
    spans = list(strided(length, context, stride))
    assert scored(spans) == list(range(1, length))
    for number, span in enumerate(spans):
        assert span.start == number * stride and span.end - span.start <= context
        assert number == 0 or span.scored <= stride


def test_strided_by_hand() -> None:
    assert list(strided(10, 6, 3)) == [WindowSpan(0, 6, 5), WindowSpan(3, 9, 3), WindowSpan(6, 10, 1)]
