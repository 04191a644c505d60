"""Calibration samples: rows of tokens from a suite's data, the bundled model's own kind of text, or a file."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neoquant.data.documents import read_documents
from neoquant.data.fingerprints import hash_texts
from neoquant.data.suite import FileData, StdlibData, Suite, load_suite, suite_names
from neoquant.errors import RequestError
from neoquant.progress import SILENT, Progress
from neoquant.sizes import plural
from neoquant.tokenizer.tokenizer import Tokenizer

ROWS, LENGTH = 128, 2048  # of text, where nothing else is asked for; a row is never longer than the context

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


MAX_TOKENS = 2**30  # that are drawn at once: 8 GB


@dataclass(frozen=True)
class Calibration:
    """Rows of token ids, and where they come from.

    `ids` int64[rows, length]; `source` in words; `sha256` of the text they were drawn from; `seed` of the drawing;
    `documents` the fingerprints of those that some row holds a part of.
    """

    ids: Tensor = field(repr=False)
    source: str
    sha256: str
    seed: int
    documents: tuple[str, ...] = field(default=(), repr=False)

    def describe(self) -> dict[str, Any]:
        """For records: everything but the ids, which are counted, and the documents."""
        rows, length = self.ids.shape
        return {"source": self.source, "sha256": self.sha256, "rows": rows, "length": length, "seed": self.seed}


def draw(texts: Sequence[Sequence[int]], end: int, rows: int, length: int, seed: int) -> Tensor:
    """`rows` pieces of `length` ids, int64, from anywhere in the texts (as ids) joined by `end`.

    Raises RequestError if there is less text than one row.
    """
    if rows < 1 or length < 1:
        raise RequestError(f"{plural(rows, 'row')} of {plural(length, 'token')}: at least one of each is needed")
    if not 0 <= seed < 2**63:
        raise RequestError(f"seed is {seed}; legal is 0 to {2**63 - 1}")
    if rows * length > MAX_TOKENS:
        raise RequestError(
            f"{plural(rows, 'row')} of {plural(length, 'token')}: at most {MAX_TOKENS:,} tokens are drawn"
        )
    stream = torch.tensor([token for text in texts for token in (*text, end)], dtype=torch.int64)
    return torch.stack([stream[start : start + length] for start in _starts(len(stream), rows, length, seed)])


def drawn_from(texts: Sequence[Sequence[int]], rows: int, length: int, seed: int) -> list[int]:
    """Which of the texts the rows of `draw` hold a token of, in order."""
    ends = list(accumulate(len(text) + 1 for text in texts))
    starts = _starts(ends[-1] if ends else 0, rows, length, seed)
    touched = set()
    for start in starts:
        first, last = bisect_right(ends, start), bisect_right(ends, start + length - 1)
        # the last of a text's ids in the stream is the end that stands behind it
        touched |= {number for number in range(first, last + 1) if texts[number] and start < ends[number] - 1}
    return sorted(touched)


def _starts(total: int, rows: int, length: int, seed: int) -> list[int]:
    """Where in a stream of so many ids each row begins."""
    if total < length:
        raise RequestError(f"calibration needs {plural(length, 'token')} for a row, the text has {total}")
    random = torch.Generator().manual_seed(seed)
    starts: list[int] = torch.randint(0, total - length + 1, (rows,), generator=random).tolist()
    return starts


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
    suite = calibration_suite(source)
    found, documents = read_documents(suite, progress)
    texts = [document.text for document in documents]
    end = tokenizer.eos_token_id
    if end is None:
        raise RequestError("the tokenizer names no end of text, which stands between documents")
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    ids = draw(encoded, end, rows, length, seed)
    fingerprints = dict.fromkeys(documents[number].fingerprint for number in drawn_from(encoded, rows, length, seed))
    name = Path(found.name).name if isinstance(suite.data, FileData) else found.name
    at = f" at {found.revision}" if found.revision else ""
    return Calibration(ids, f"{name}{at}", hash_texts(texts), seed, tuple(fingerprints))


def _everything(data: FileData | StdlibData) -> Suite:
    """A suite of all that `data` holds, beginnings of long texts only."""
    return Suite.model_validate({"name": "calibration", "data": data})


def calibration_suite(source: str | Path) -> Suite:
    """The suite whose data is calibrated on. Raises RequestError for a name that is none."""
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
