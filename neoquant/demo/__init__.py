"""The model that comes with neoquant: a small GPT-Neo that has read the Python standard library."""

from __future__ import annotations

from pathlib import Path

NAME = "neoquant-demo"
"""What stands for the bundled model wherever a model is named, unless a folder of that name is there."""

MODEL = Path(__file__).parent / NAME


def is_shadowed() -> bool:
    """Whether a folder in the current one has the bundled model's name, and is meant by it."""
    return Path(NAME).exists()


def resolve(source: str | Path | None) -> str | Path:
    """`source`, or the bundled model's folder where that is named, or nothing is."""
    if source is None or (str(source) == NAME and not is_shadowed()):
        return MODEL
    return source
