"""From a suite to windows of tokens: reading, tokenizing, cutting, hashing."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from neoquant.data.documents import Document, Source, open_documents, require_short, select
from neoquant.data.suite import Suite
from neoquant.data.tasks import last_word, wikitext
from neoquant.errors import DataError, RequestError, locate
from neoquant.evaluation.windows import WindowSpan, joined, rolling, strided
from neoquant.progress import Progress
from neoquant.sizes import plural


class TokenizerLike(Protocol):
    """A tokenizer, as far as the evaluation needs one."""

    @property
    def sha256(self) -> str: ...
    @property
    def eos_token_id(self) -> int | None: ...
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...


class Unit(NamedTuple):
    """What is left out one at a time for intervals: a document, or a window where documents were joined."""

    id: str
    subset: str
    tokens: int  # scored
    bytes: int  # of UTF-8 that the scored tokens spell
    words: int | None = None  # of a document: what whitespace separates


class Window(NamedTuple):
    """`ids[:-1]` is read, the predictions of the last `scored` ids count towards unit number `unit`."""

    unit: int
    ids: torch.Tensor  # int32[at most context + 1]
    scored: int


@dataclass(frozen=True)
class Corpus:
    """A suite's text, ready to be scored."""

    suite: Suite
    source: Source
    sha256: str  # of all documents in order: id, subset and text
    documents: dict[str, int]  # subset -> documents, in order of appearance
    units: tuple[Unit, ...]
    windows: tuple[Window, ...]
    notes: tuple[str, ...]  # what a reader of the figures must know, a line each
    fingerprints: tuple[str, ...] = ()  # of the documents, see `calibration.fingerprint`
    excluded: int = 0  # documents that were left out because a model was calibrated on them

    @property
    def tokens(self) -> int:
        return sum(unit.tokens for unit in self.units)


def read_corpus(
    suite: Suite, tokenizer: TokenizerLike, progress: Progress, exclude: Collection[str] = frozenset()
) -> Corpus:
    """Read, tokenize and cut the text of `suite`, without the documents that have a fingerprint of `exclude`.

    The suite's context must be set (`Suite.fitted`). Raises DataError for data that cannot be read or leaves nothing to
    score, RequestError for a tokenizer without an end-of-text token.
    """
    assert suite.context is not None, "Suite.fitted sets the context"
    source, documents = _open(suite, progress)
    stream = _DocumentStream(documents, exclude)
    if suite.protocol == "rolling":
        units, windows = _by_document(stream, tokenizer, suite.context)
        notes = _plural_note(sum(unit.tokens == 0 for unit in units), "{} empty, with nothing to score")
    elif suite.protocol == "last-word":
        units, windows = _by_last_word(stream, tokenizer, suite.context, source.name)
        notes = []
    else:
        read = list(stream)
        with progress.task("tokenizing", total=sum(len(document.text) for document in read)) as advance:
            units, windows, notes = _by_subset(read, tokenizer, suite, advance)
    _require_tokens(suite, stream, units)
    return Corpus(
        suite,
        source,
        stream.kept_sha256.hexdigest(),
        dict(stream.counts),
        tuple(units),
        tuple(windows),
        (*notes, *_notes(suite, source, stream)),
        tuple(stream.fingerprints),
        stream.excluded,
    )


def _open(suite: Suite, progress: Progress) -> tuple[Source, Iterator[Document]]:
    if suite.prepare != "wikitext":
        return open_documents(suite, progress)
    whole = suite.model_copy(update={"documents": None, "characters": None, "subsets": ()})  # limits are of articles
    source, lines = open_documents(whole, progress)
    return source, select(wikitext(lines, articles=suite.protocol == "rolling"), suite)


class _DocumentStream:
    """Iterates over documents, without those that have a fingerprint of `exclude`, and counts and hashes them.

    So their texts need not stay in memory.
    """

    def __init__(self, documents: Iterator[Document], exclude: Collection[str] = ()) -> None:
        self.documents, self.exclude = documents, exclude
        self.counts: Counter[str] = Counter()  # subset -> documents
        self.subsets: dict[str, None] = {}  # with those of which every document is excluded
        self.fingerprints: list[str] = []
        self.invalid_utf8 = self.excluded = 0
        self.kept_sha256, self.whole_sha256 = hashlib.sha256(), hashlib.sha256()

    def __iter__(self) -> Iterator[Document]:
        for document in self.documents:
            self.subsets[document.subset] = None
            _hash(document, self.whole_sha256)
            if document.fingerprint in self.exclude:
                self.excluded += 1
                continue
            self.counts[document.subset] += 1
            self.fingerprints.append(document.fingerprint)
            self.invalid_utf8 += document.mended
            _hash(document, self.kept_sha256)
            yield document


def _require_tokens(suite: Suite, stream: _DocumentStream, units: list[Unit]) -> None:
    """Raise DataError unless every subset has a token to score."""
    for subset, count in stream.counts.items():
        if not any(unit.subset == subset and unit.tokens for unit in units):
            raise DataError(
                f"subset {subset!r} of suite {suite.name} leaves nothing to score: " + _no_text(count, suite)
            )
    if not stream.counts:
        raise DataError(
            f"nothing of suite {suite.name} is left: calibrated on all of {plural(stream.excluded, 'document')}"
        )


def _no_text(count: int, suite: Suite) -> str:
    """Why so many documents of a subset have no token to score: rolling scores any, the others whole windows."""
    few = "its one document is" if count == 1 else f"its {count} documents are"
    return f"{few} empty" + (
        "" if suite.protocol == "rolling" else f", or shorter than a window of {suite.context} tokens"
    )


def _notes(suite: Suite, source: Source, stream: _DocumentStream) -> Iterator[str]:
    """What a reader of the figures must know of the documents."""
    sha256 = stream.whole_sha256.hexdigest()
    if suite.sha256 and suite.sha256 != sha256:
        yield (
            f"the documents are not those of the published figures (sha256 {sha256[:12]}, not {suite.sha256[:12]}): "
            f"{' '.join(filter(None, source))}"
        )
    yield from _excluded_note(stream)
    yield from _plural_note(stream.invalid_utf8, "{} not valid UTF-8 throughout, read with U+FFFD in place")
    yield from _shortage_note(stream.counts, suite.documents)


def _excluded_note(stream: _DocumentStream) -> list[str]:
    """How many documents were left out because they were calibrated on, and which subsets with them."""
    if not stream.excluded:
        return []
    empty = [subset for subset in stream.subsets if subset not in stream.counts]
    subsets = f", with them all of {', '.join(empty)}" if empty else ""
    whole = stream.excluded + len(stream.fingerprints)
    return [f"calibrated on and left out: {stream.excluded} of {plural(whole, 'document')}{subsets}"]


def _hash(document: Document, digest: hashlib._Hash) -> None:
    """Add a document's id, subset and text, with their lengths in bytes before them."""
    for part in (document.id, document.subset, document.text):
        encoded = part.encode()
        digest.update(f"{len(encoded)}:".encode() + encoded)


def documents_sha256(documents: Iterable[Document]) -> str:
    """One hash for a list of documents: each one's id, subset and text."""
    digest = hashlib.sha256()
    for document in documents:
        _hash(document, digest)
    return digest.hexdigest()


def _by_document(
    documents: Iterable[Document], tokenizer: TokenizerLike, context: int
) -> tuple[list[Unit], list[Window]]:
    start = tokenizer.eos_token_id
    if start is None:
        raise RequestError(
            "the rolling protocol begins every document with the end-of-text token: this tokenizer has none"
        )
    units, windows = [], []
    for number, document in enumerate(documents):
        ids = torch.tensor([start, *tokenizer.encode(document.text, add_special_tokens=False)], dtype=torch.int32)
        original = document.text if document.original is None else document.original
        words = len(re.split(r"\s+", original))
        units.append(Unit(document.id, document.subset, len(ids) - 1, len(original.encode()), words))
        windows += [Window(number, ids[s.start : s.end], s.scored) for s in rolling(len(ids), context)]
    return units, windows


def _by_last_word(
    documents: Iterable[Document], tokenizer: TokenizerLike, context: int, source: str
) -> tuple[list[Unit], list[Window]]:
    """One window a document: as much of the passage as fits, and the last word, which alone is scored."""
    units, windows = [], []
    for number, document in enumerate(documents):
        with locate(source):
            passage, word = last_word(document)
        before = tokenizer.encode(passage, add_special_tokens=False)
        ids = tokenizer.encode(passage + word, add_special_tokens=False)
        scored = len(ids) - len(before)
        if not before and tokenizer.eos_token_id is not None:
            ids = [tokenizer.eos_token_id, *ids]
        if scored < 1 or scored > context or ids[: len(ids) - scored][-len(before) :] != before:
            raise DataError(f"{source}: {document.id}: the last word is not tokenized apart from what precedes it")
        units.append(Unit(document.id, document.subset, scored, len(word.encode()), 1))
        windows.append(Window(number, torch.tensor(ids[-context - 1 :], dtype=torch.int32), scored))
    return units, windows


def _by_subset(
    documents: list[Document], tokenizer: TokenizerLike, suite: Suite, advance: Callable[[float], None]
) -> tuple[list[Unit], list[Window], list[str]]:
    units: list[Unit] = []
    windows: list[Window] = []
    notes: list[str] = []
    for subset in dict.fromkeys(document.subset for document in documents):
        text = "\n\n".join(document.text for document in documents if document.subset == subset)
        require_short(text, f"subset {subset!r}, joined,")
        ids = tokenizer.encode(text, add_special_tokens=False)
        spans = list(_spans(len(ids), suite))
        offsets = byte_offsets(text, ids, (e for s in spans for e in (s.end - s.scored, s.end)), tokenizer.decode)
        tensor = torch.tensor(ids, dtype=torch.int32)
        for number, span in enumerate(spans):
            size = offsets[2 * number + 1] - offsets[2 * number]
            windows.append(Window(len(units), tensor[span.start : span.end], span.scored))
            units.append(Unit(f"window {number}", subset, span.scored, size))
        dropped = len(ids) - (spans[-1].end if spans else 0)
        if dropped:
            notes.append(f"{subset}: dropped for filling no window: the last {plural(dropped, 'token')}")
        advance(len(text))
    return units, windows, notes


def _spans(length: int, suite: Suite) -> Iterator[WindowSpan]:
    assert suite.context is not None
    if suite.protocol == "joined":
        return joined(length, suite.context)
    assert suite.stride is not None
    return strided(length, suite.context, suite.stride)


def byte_offsets(text: str, ids: list[int], positions: Iterable[int], decode: Callable[[list[int]], str]) -> list[int]:
    """How many UTF-8 bytes of `text` the first `position` tokens spell, for ascending positions.

    A position inside a character counts as the character's start, so the stretches between positions add up exactly.
    """
    offsets = []
    token = characters = size = 0  # up to here, tokens and characters end together
    for position in positions:
        piece = decode(ids[token:position])
        if position == len(ids):
            offsets.append(len(text.encode()))
        elif piece.endswith("\ufffd") or not text.startswith(piece, characters):  # cut inside a character
            offsets.append(size + len(piece.rstrip("\ufffd").encode()))
        else:
            token = position
            characters += len(piece)
            size += len(piece.encode())
            offsets.append(size)
    return offsets


def _plural_note(count: int, verb: str) -> list[str]:
    """`["3 documents are ..."]`, or nothing for none."""
    return [verb.format("1 document is" if count == 1 else f"{count} documents are")] if count else []


def _shortage_note(counts: Mapping[str, int], wanted: int | None) -> list[str]:
    short = [f"{subset} {count}" for subset, count in counts.items() if wanted and count < wanted]
    return [f"fewer than {wanted} documents: {', '.join(short)}"] if short else []
