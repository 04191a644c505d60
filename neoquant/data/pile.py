"""The Pile's subsets by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Final

from neoquant.errors import RequestError

PILE: Final = (
    "ArXiv",
    "BookCorpus2",
    "Books3",
    "DM Mathematics",
    "Enron Emails",
    "EuroParl",
    "FreeLaw",
    "Github",
    "Gutenberg (PG-19)",
    "HackerNews",
    "NIH ExPorter",
    "OpenSubtitles",
    "OpenWebText2",
    "PhilPapers",
    "Pile-CC",
    "PubMed Abstracts",
    "PubMed Central",
    "StackExchange",
    "USPTO Backgrounds",
    "Ubuntu IRC",
    "Wikipedia (en)",
    "YoutubeSubtitles",
)
"""All 22, as the data spells them (Gao et al., 2020, table 1)."""

_OTHER_NAMES: Final = {"commoncrawl": "Pile-CC", "cc": "Pile-CC", "pg19": "Gutenberg (PG-19)", "pmc": "PubMed Central"}


def loose(subset: str) -> str:
    """The letters and digits of a subset's name, without what it says in brackets."""
    return re.sub(r"\(.*?\)|[\W_]", "", subset).casefold() or subset


def pile_subsets(names: Iterable[str]) -> tuple[str, ...]:
    """The Pile's spelling of each name: case, spaces and punctuation do not matter, a part that only one has is enough.

    Raises RequestError for a name that is none, or several, and lists those that there are.
    """
    return tuple(dict.fromkeys(_pile_subset(name) for name in names))


def _pile_subset(name: str) -> str:
    wanted = loose(name)
    known = {loose(subset): subset for subset in PILE} | _OTHER_NAMES
    if wanted in known:
        return known[wanted]
    found = [subset for subset in PILE if wanted and wanted in loose(subset)]
    if len(found) == 1:
        return found[0]
    if found:
        raise RequestError(f"subset {name!r} may be {' or '.join(found)}: say which")
    close = difflib.get_close_matches(wanted, known, n=1)
    hint = f"did you mean {known[close[0]]}? " if close else ""
    raise RequestError(f"the Pile has no subset {name!r}; {hint}it has {', '.join(PILE)}")
