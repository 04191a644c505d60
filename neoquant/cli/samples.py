"""The calibration samples that command-line options describe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from neoquant.cli.terminal import Terminal

if TYPE_CHECKING:
    from neoquant.calibration.dataset import Calibration


def read_samples(
    source: str | Path,
    revision: str | None,
    name: str | None,
    rows: int,
    length: int | None,
    seed: int,
    terminal: Terminal,
) -> Calibration | None:
    """The rows to calibrate on, as long as the model's context unless `length` is stated; None if none are named."""
    if name is None:
        return None
    from neoquant.calibration.dataset import LENGTH, load_calibration
    from neoquant.checkpoint import open_checkpoint
    from neoquant.loading.pretrained import load_tokenizer
    from neoquant.model.config import GPTNeoConfig

    with open_checkpoint(source, revision=revision, headers_only=True, progress=terminal.progress) as checkpoint:
        context = GPTNeoConfig.from_dict(checkpoint.config).max_position_embeddings
    return load_calibration(
        name,
        load_tokenizer(source, revision=revision),
        rows=rows,
        length=min(LENGTH, context) if length is None else length,
        seed=seed,
        progress=terminal.progress,
    )
