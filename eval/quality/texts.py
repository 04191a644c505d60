"""Text for a measurement of quality: some documents to calibrate on, others to score, never one for both."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

from neoquant.calibration.dataset import Calibration, draw, load_calibration
from neoquant.data.documents import Document, read_documents
from neoquant.data.fingerprints import hash_texts
from neoquant.data.suite import Suite, load_suite
from neoquant.evaluation.corpus import documents_sha256
from neoquant.progress import SILENT
from neoquant.tokenizer.tokenizer import Tokenizer

RULE = (
    "in each subset of the file the documents are shuffled, seeded by seed and subset; the first half, rounded down, "
    "is calibrated on (whole), the rest is scored (its beginnings)"
)
DEMO_RULE = "calibration text and suite of the bundled model: different modules of the standard library"


@dataclass(frozen=True)
class Texts:
    """What one seed calibrates on and scores."""

    calibration: Calibration
    suite: Suite  # of the scored documents
    names: list[str]  # of the scored documents, in the original file
    sha256: str  # of the scored documents, as they are scored


def texts(
    source: str, tokenizer: Tokenizer, *, rows: int, length: int, characters: int, seed: int, folder: Path
) -> Texts:
    """Of a JSON-lines file, split by `RULE`, or of `demo`, the bundled model's own kind.

    At most `characters` of each scored document count. What is scored of a file is written into `folder`.
    """
    if source == "demo":
        calibration = load_calibration("demo", tokenizer, rows=rows, length=length, seed=seed)
        suite = load_suite("demo").model_copy(update={"characters": characters, "sha256": None})
        _, scored = read_documents(suite, SILENT)
        return Texts(calibration, suite, [d.id for d in scored], documents_sha256(scored))
    _, documents = read_documents(Suite.of_file(source), SILENT)
    shown, scored = split(documents, seed)
    end = tokenizer.eos_token_id
    assert end is not None, "GPT-Neo's tokenizers name an end of text"
    ids = draw([tokenizer.encode(d.text) for d in shown], end, rows, length, seed)
    calibration = Calibration(ids, f"half of {Path(source).name}", hash_texts([d.text for d in shown]), seed)
    scored = [replace(d, text=d.text[:characters]) for d in scored]
    held_out = folder / "held-out.jsonl"
    lines = [{"text": d.text, "meta": {"pile_set_name": d.subset}} for d in scored]
    held_out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return Texts(calibration, Suite.of_file(held_out), [d.id for d in scored], documents_sha256(scored))


def split(documents: list[Document], seed: int) -> tuple[list[Document], list[Document]]:
    """`RULE`: (calibrated on, scored), both in the order of the file."""
    shown = set()
    for subset in dict.fromkeys(document.subset for document in documents):
        names = [document.id for document in documents if document.subset == subset]
        random.Random(f"{seed} {subset}").shuffle(names)
        shown |= set(names[: len(names) // 2])
    return [d for d in documents if d.id in shown], [d for d in documents if d.id not in shown]
