"""Texts that are prepared before they are scored as their field does it: WikiText's articles, LAMBADA's last words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from neoquant.data.documents import Document
from neoquant.errors import DataError

_TITLE = re.compile(r" ?= [^=]+ = ?\n?")  # `= = Section = =` is none

# WikiText's tokens put back together as lm-evaluation-harness does, in its order: exact text, or a pattern where one is
# given. Its figures are only comparable where every quirk is kept.
_REJOINED: tuple[tuple[str | re.Pattern[str], str], ...] = (
    ("s '", "s'"),
    (re.compile(r"/' [0-9]/"), r"/'[0-9]/"),
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
    *(
        (re.compile(rf"{re.escape(left)}\s*([^{re.escape(right)}]*?)\s*{re.escape(right)}"), rf"{left}\1{right}")
        for left, right in ("()", "[]", "{}", '""', "''")
    ),
    *((" ".join("=" * n), "=" * n) for n in (4, 3, 2)),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def rejoin(text: str) -> str:
    """WikiText with its tokens' spaces taken out."""
    for old, new in _REJOINED:
        text = text.replace(old, new) if isinstance(old, str) else old.sub(new, text)
    return text


def wikitext(documents: Iterable[Document], *, articles: bool) -> Iterator[Document]:
    """WikiText's lines, from one file or a row each, as articles (rejoined) or as the one text that GPTQ papers cut.

    An article's bytes and words are counted before it is rejoined, as lm-evaluation-harness does.
    """
    lines: list[str] = []
    number = 0
    subset = "wikitext"

    def article() -> Iterator[Document]:
        text = "".join(lines)
        if text.strip():
            yield Document(f"article {number}", subset, rejoin(text), original=text)

    for document in documents:
        subset = document.subset
        found = document.text.split("\n")
        for line in found[:-1] if len(found) > 1 and not found[-1] else found:
            if articles and _TITLE.fullmatch(line):
                yield from article()
                lines, number = [], number + 1
            if articles:
                lines.append(f"{line}\n" if line.strip() else " \n")
            else:
                lines.append(f"{line}\n" if line.strip() else "")
    if articles:
        yield from article()
    elif lines:
        yield Document("all lines", subset, "\n\n".join(lines))


def last_word(document: Document) -> tuple[str, str]:
    """A passage and the word after it, with its space. Raises DataError for a text of a single word."""
    passage, space, word = document.text.rpartition(" ")
    if not space or not word:
        raise DataError(f"{document.id}: no last word after a space to predict")
    return passage, space + word
