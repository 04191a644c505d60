"""The model that comes with neoquant: a small GPT-Neo that has read the Python standard library."""

from __future__ import annotations

from pathlib import Path

MODEL = Path(__file__).parent / "neoquant-demo"
