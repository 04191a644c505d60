"""Reading the documents of a suite, whatever holds them."""

from __future__ import annotations

import codecs
import importlib
import io
import logging
import os
import platform
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from neoquant.data.fingerprints import fingerprint
from neoquant.data.pile import loose
from neoquant.data.suite import FileData, HubData, StdlibData, Suite
from neoquant.data.zstd_frames import ZstdFrames
from neoquant.errors import DataError, HubError, locate
from neoquant.files.names import as_text
from neoquant.files.reading import parse_json, read_bytes
from neoquant.progress import Progress
from neoquant.sizes import parse_size

MAX_TEXT_BYTES = 32_000_000
"""Of a document, or of a line of a file."""

MAX_FILE_BYTES = 1 << 30
"""Of a file that is one text."""

VARIABLE = "NEOQUANT_MAX_TEXT_SIZE"
"""Environment variable that takes the place of MAX_TEXT_BYTES, like `100MB`."""

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class Document:
    """One text, and the subset that its score counts towards."""

    id: str
    subset: str
    text: str
    mended: bool = False  # it held something that is not valid UTF-8, now U+FFFD
    fingerprint: str = field(default="", compare=False)  # of the whole text, however much of it is read
    original: str | None = None  # whose bytes and words are counted, where they are not the text's

    def __post_init__(self) -> None:
        """A file's name and a JSON string may hold what no UTF-8 text does."""
        for name in ("id", "subset"):
            object.__setattr__(self, name, as_text(getattr(self, name)))


class Source(NamedTuple):
    """Where documents came from, for the record."""

    name: str
    revision: str | None


def read_documents(suite: Suite, progress: Progress) -> tuple[Source, list[Document]]:
    """The documents that `suite` selects, in the data's order.

    Raises DataError for data that is missing or damaged or has no document of a subset that the suite names, HubError.
    """
    source, documents = open_documents(suite, progress)
    return source, list(documents)


def open_documents(suite: Suite, progress: Progress) -> tuple[Source, Iterator[Document]]:
    """The same, one document after the other: errors of the data come while they are read."""
    data = suite.data
    if isinstance(data, StdlibData):
        source = Source("Python standard library", platform.python_version())
        return source, _located(None, select(stdlib_documents(data.modules, data.topics), suite))
    if isinstance(data, FileData):
        path = Path(data.path)
        return Source(str(path), None), _located(str(path), select(file_documents(path, progress), suite))
    place = f"data set {data.dataset}"
    with locate(place):
        source = hub_source(data)
    return source, _located(place, select(hub_documents(data, progress), suite))


def _located(place: str | None, documents: Iterator[Document]) -> Iterator[Document]:
    with locate(place) if place else nullcontext():
        yield from documents


def text_limit() -> int:
    """The bytes of text that are tokenized at once: MAX_TEXT_BYTES, or what the environment says."""
    stated = os.environ.get(VARIABLE)
    return parse_size(stated, VARIABLE) if stated else MAX_TEXT_BYTES


def require_short(text: str, what: str) -> None:
    """Raise DataError for more text than is tokenized at once: a tokenizer takes about fifty times its memory."""
    limit = text_limit()
    if len(text) > limit // 4 and (size := len(text.encode("utf-8", "replace"))) > limit:
        raise DataError(
            f"{what} has {size:,} bytes of text, and at most {limit:,} are tokenized at once; "
            f"set {VARIABLE} to read more"
        )


def select(documents: Iterable[Document], suite: Suite) -> Iterator[Document]:
    """The documents of the suite's subsets, as many and as long as it says; stops reading when it has them all.

    A subset may be named loosely: `pile-cc` is `Pile-CC`, `wikipedia` is `Wikipedia (en)`. Raises DataError, at the
    end, if there was no document of one that is named, or none at all.
    """
    wanted = {loose(name): name for name in suite.subsets}
    taken: Counter[str] = Counter()
    seen: dict[str, None] = {}
    for document in documents:
        key = loose(document.subset)
        seen[document.subset] = None
        if (wanted and key not in wanted) or taken[key] == suite.documents:
            continue
        taken[key] += 1
        known_by = fingerprint(document.text)
        text = document.text[: suite.characters]
        require_short(text, document.id)
        yield replace(document, text=text, fingerprint=known_by)
        if wanted and suite.documents and len(taken) == len(wanted) and min(taken.values()) == suite.documents:
            return
    if not seen:
        raise DataError("it holds no document")
    missing = [name for key, name in wanted.items() if key not in taken]
    if missing:
        raise DataError(f"no document of subset {', '.join(map(repr, missing))}: it holds {', '.join(sorted(seen))}")


# the standard library ------------------------------------------------------------------------------------------------


def stdlib_documents(modules: Mapping[str, Sequence[str]], topics: Mapping[str, Sequence[str]]) -> Iterator[Document]:
    """The running Python's own standard library: modules' sources and pydoc's help topics, by subset.

    Raises DataError for a module or topic that this Python does not have.
    """
    for subset, names in modules.items():
        for name in names:
            yield Document(name, subset, module_path(name).read_text(encoding="utf-8"))
    for subset, names in topics.items():
        known: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        for name in names:
            if name not in known:
                raise DataError(
                    f"this Python's pydoc has no topic {name!r} (for example {', '.join(sorted(known)[:3])})"
                )
            yield Document(name, subset, known[name])


def module_path(name: str) -> Path:
    """Where the standard library keeps the source of module `name`; found without importing it."""
    stem = Path(sysconfig.get_path("stdlib"), *name.split("."))
    for path in (stem.with_suffix(".py"), stem / "__init__.py"):
        if path.is_file():
            return path
    raise DataError(f"this Python's standard library has no source of module {name!r} (looked for {stem}.py)")


# files ---------------------------------------------------------------------------------------------------------------


def file_documents(path: Path, progress: Progress) -> Iterator[Document]:
    """The documents of a `.jsonl` or `.jsonl.zst` file, of a `.txt` or `.raw` file (one), or of a folder of these."""
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if _kind(file) and file.is_file()]
        if not files:
            raise DataError("the folder holds no .jsonl, .jsonl.zst, .txt or .raw file")
        for file in files:
            if _kind(file) == "text":
                yield _text_document(file, subset=path.name)
                continue
            with locate(file.name):
                for document in _json_lines(file, progress, subset=path.name):
                    yield replace(document, id=f"{file.name} {document.id}")
    elif not path.exists():
        raise DataError("no such file")
    elif not path.is_file():
        raise DataError("is a device or a pipe, and texts are read more than once: give a file")
    elif _kind(path) == "text":
        yield _text_document(path, subset=path.stem)
    elif _kind(path) == "rows":
        yield from _json_lines(path, progress, subset=path.name.split(".")[0])
    else:
        raise DataError(
            f"cannot read {path.suffix or 'a file without a suffix'}: give .jsonl, .jsonl.zst, .txt or .raw"
        )


def _kind(path: Path) -> str | None:
    if path.suffix == ".jsonl" or path.suffixes[-2:] == [".jsonl", ".zst"]:
        return "rows"
    return "text" if path.suffix in (".txt", ".raw") else None


def _text_document(path: Path, subset: str) -> Document:
    content = read_bytes(path, limit=MAX_FILE_BYTES, error=DataError)
    _require_no_utf16(content, path.name)
    text, mended = _decoded(content.removeprefix(codecs.BOM_UTF8))
    return Document(path.name, subset, text, mended)


def _require_no_utf16(content: bytes, name: str) -> None:
    if content.startswith(_UTF16):
        raise DataError(f"{name} is UTF-16: convert it to UTF-8")


def _json_lines(path: Path, progress: Progress, subset: str) -> Iterator[Document]:
    with path.open("rb") as file, progress.task(f"reading {path.name}", total=path.stat().st_size) as advance:
        position = 0
        with _decompressed(file, path) as lines:
            for number, line in enumerate(_lines(lines, text_limit()), start=1):
                if number == 1:
                    _require_no_utf16(line, path.name)
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield _json_document(line, number, subset)
                advance(file.tell() - position)
                position = file.tell()


def _lines(file: BinaryIO, limit: int) -> Iterator[bytes]:
    """The lines of a file; one is never longer than `limit` bytes in memory."""
    number = 0
    while line := file.readline(limit + 1):
        number += 1
        if len(line) > limit:
            raise DataError(f"line {number} has more than {limit:,} bytes; set {VARIABLE} to read more")
        yield line


@contextmanager
def _decompressed(file: BinaryIO, path: Path) -> Iterator[BinaryIO]:
    """The content of `file`, through zstandard where its name says so."""
    if path.suffix != ".zst":
        yield file
        return
    import zstandard

    try:
        yield cast("BinaryIO", io.BufferedReader(ZstdFrames(file)))
    except zstandard.ZstdError as error:
        raise DataError(f"not a whole zstandard file: {error}") from None


def _json_document(line: bytes, number: int, subset: str) -> Document:
    with locate(f"line {number}"):
        text, mended = _decoded(line)
        try:
            row = parse_json(text)
        except ValueError as error:
            raise DataError(f"not JSON: {error}") from None
        document = row_document(row, f"line {number}", subset)
        return Document(document.id, document.subset, document.text, document.mended or mended)


def row_document(row: Any, name: str, subset: str) -> Document:
    """A document from a row in the Pile's form; one that names no `meta.pile_set_name` counts towards `subset`."""
    if not isinstance(row, dict):
        raise DataError(f'a row is {_short(row)}, expected an object with a "text"')
    if not isinstance(row.get("text"), str):
        found = (
            f'"text" is {_short(row["text"])}' if "text" in row else f"the row has no text, only {_short(sorted(row))}"
        )
        raise DataError(f"{found}; expected a string")
    meta = row.get("meta")
    named = meta.get("pile_set_name") if isinstance(meta, dict) else None
    if not isinstance(named, str | None):
        raise DataError(f'"pile_set_name" is {_short(named)}; expected a string')
    # JSON may spell half a surrogate pair, which no UTF-8 text holds
    text = row["text"].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return Document(name, subset if named is None else named, text, mended=text != row["text"])


def _short(value: Any) -> str:
    return f"{value!r:.80}"


def _decoded(raw: bytes) -> tuple[str, bool]:
    """UTF-8 to text; invalid bytes become U+FFFD, and whether there were any."""
    try:
        return raw.decode("utf-8"), False
    except UnicodeDecodeError:
        return raw.decode("utf-8", "replace"), True


# the hub -------------------------------------------------------------------------------------------------------------


def hub_source(data: HubData) -> Source:
    """The data set, and the commit that its revision names today."""
    if Path(data.dataset).is_dir():
        return Source(f"{data.dataset}, {data.split}", None)
    name = f"{data.dataset}, {data.split}"
    if re.fullmatch("[0-9a-f]{40}", data.revision):
        return Source(name, data.revision)
    from huggingface_hub import HfApi

    with _hub_errors(data):
        return Source(name, HfApi().dataset_info(data.dataset, revision=data.revision).sha)


def hub_documents(data: HubData, progress: Progress) -> Iterator[Document]:
    """The rows of a hub data set, streamed (from the cache, where the hub is switched off)."""
    import datasets
    from huggingface_hub import constants

    datasets.disable_progress_bars()
    subset = data.dataset.split("/")[-1]
    with _hub_errors(data):
        config = (data.config,) if data.config else ()
        streaming = not constants.HF_HUB_OFFLINE
        rows = datasets.load_dataset(
            data.dataset, *config, split=data.split, revision=data.revision, streaming=streaming
        )
        known = (rows.info.splits or {}).get(data.split)
        with progress.task(f"reading {data.dataset}", total=known.num_examples if known else None) as advance:
            for number, row in enumerate(rows, start=1):
                with locate(f"row {number}"):
                    document = row_document(row, f"row {number}", subset)
                yield document
                advance(1)


@contextmanager
def _hub_errors(data: HubData) -> Iterator[None]:
    """Turn what the hub's libraries raise into one line, and keep what they log about retrying to themselves."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    # HfHubHTTPError inherits from OSError and the root of whatever HTTP library this huggingface_hub uses
    transport = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "datasets")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    except (*transport, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise HubError(
            f"split {data.split!r} at revision {data.revision[:12]} cannot be read: {reason[0]} "
            "(a local .jsonl, .jsonl.zst or .txt file can take its place: with --data, or as the text of --calibration)"
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
