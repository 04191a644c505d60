"""Text for calibration: from a suite's data, the bundled model's own kind, or a file."""

from __future__ import annotations

from pathlib import Path

from neoquant.calibration import LENGTH, ROWS, Calibration, draw, drawn_from, hash_texts
from neoquant.errors import RequestError
from neoquant.evaluation.corpus import Tokenizer
from neoquant.evaluation.documents import read_documents
from neoquant.evaluation.suite import FileData, StdlibData, Suite, load_suite, suite_names
from neoquant.progress import SILENT, Progress

# Of the bundled model's kind, and none of what the suite `demo` holds out.
_DEMO = StdlibData(
    kind="stdlib",
    modules={
        "python": (
            *("argparse", "ast", "asyncio.base_events", "codecs", "collections", "configparser", "copy", "dataclasses"),
            *("datetime", "decimal", "enum", "functools", "http.client", "inspect", "logging", "optparse", "pathlib"),
            *("pickle", "shutil", "subprocess", "tarfile", "threading", "turtle", "typing", "unittest.mock", "zipfile"),
        )
    },
)


def load_calibration(
    source: str | Path,
    tokenizer: Tokenizer,
    *,
    rows: int = ROWS,
    length: int = LENGTH,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Calibration:
    """Rows of `length` tokens from a file (.jsonl, .jsonl.zst, .txt), `demo`, `pile`, or another suite's data.

    Raises RequestError for a name that is none of these or too little text, DataError for data that cannot be read.
    """
    suite = _suite(source)
    found, documents = read_documents(suite, progress)
    texts = [document.text for document in documents]
    end = tokenizer.eos_token_id
    if end is None:
        raise RequestError("the tokenizer names no end of text, which stands between documents")
    encoded = [tokenizer.encode(text) for text in texts]
    ids = draw(encoded, end, rows, length, seed)
    seen = dict.fromkeys(documents[number].fingerprint for number in drawn_from(encoded, rows, length, seed))
    name = Path(found.name).name if isinstance(suite.data, FileData) else found.name
    at = f" at {found.revision}" if found.revision else ""
    return Calibration(ids, f"{name}{at}", hash_texts(texts), seed, tuple(seen))


def _everything(data: FileData | StdlibData) -> Suite:
    """A suite of all that `data` holds, beginnings of long texts only."""
    return Suite.model_validate({"name": "calibration", "data": data})


def _suite(source: str | Path) -> Suite:
    if Path(source).is_file() and Path(source).suffix != ".toml":
        return _everything(FileData(kind="file", path=str(source)))
    if str(source) == "demo":
        return _everything(_DEMO)
    if str(source) == "pile":
        return load_suite("pile-uncopyrighted")
    try:
        return load_suite(source)
    except RequestError:
        names = ", ".join(["pile", *suite_names()])
        raise RequestError(f"calibration {str(source)!r}: give a file of text, or one of {names}") from None
