"""What stands beside tuned weights: their card, neoquant's record, and what calibration and training saw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from neoquant.checkpoint import Checkpoint
from neoquant.files.reading import read_text
from neoquant.formats import Format
from neoquant.quantization.model_card import render_tuned_card
from neoquant.quantization.quantize import CALIBRATION, CARD, RECORD, read_record, record_json

TUNED = "tuned"
"""The key of both records under which stands what tuning did."""


def tuned_files(
    checkpoint: Checkpoint, format: Format, name: str, tuning: Mapping[str, Any], documents: Iterable[str]
) -> dict[str, str | Path]:
    """The files beside the weights of a folder called `name`; `tuning` says what was done to `checkpoint`, by samples
    of `documents`, fingerprints."""
    from neoquant import __version__

    assert checkpoint.folder is not None
    record, seen = read_record(checkpoint.folder), read_record(checkpoint.folder, CALIBRATION)
    former = seen.get("documents")
    known = [*(former if isinstance(former, list) else []), *documents]
    seen = {"calibration": tuning["calibration"], **seen, "documents": list(dict.fromkeys(known)), TUNED: tuning}
    files: dict[str, str | Path] = {path.name: path for path in checkpoint.companions()}
    files[RECORD] = record_json({"neoquant": __version__, **record, TUNED: {"neoquant": __version__, **tuning}})
    files[CALIBRATION] = record_json(seen)
    card = checkpoint.folder / CARD
    former_card = read_text(card) if card.is_file() else ""
    files[CARD] = render_tuned_card(name, checkpoint.source_name, checkpoint.config, format.family, tuning, former_card)
    return files
