"""docs/evaluation.md names every field that a saved result has, where it describes what the field is part of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from neoquant.evaluation import Comparison, Inspection
from neoquant.evaluation.task_result import TaskComparison

DOCS = Path(__file__).resolve().parents[2] / "docs" / "evaluation.md"

PLACES = {  # schema's name -> the description that names its fields, where it is not the same words
    "ModelInfo": "model",
    "DataInfo": "data",
    "StdlibData": "suite",
    "FileData": "suite",
    "HubData": "suite",
    "Macro": "evaluation",
    "UnitScore": "evaluation",
    "UnitChange": "candidate",
    "WorstDocument": "candidate",
    "MacroChange": "mean change",
    "Resampling": "comparison",
    "Histogram": "distribution",
    "TokenChange": "worst token",
    "Choice": "worst token",
}


def written() -> dict[str, set[str]]:
    """What is written to JSON: record -> its keys."""
    found: dict[str, set[str]] = {}
    for kind in (Comparison, Inspection, TaskComparison):
        schema = kind.model_json_schema(mode="serialization")
        for name, record in {**schema["$defs"], kind.__name__: schema}.items():
            if "properties" in record:
                found[name] = set(record["properties"])
    return found


def described() -> dict[str, str]:
    """What the page says of each record: a line at the margin of the listing, and those below it."""
    blocks: dict[str, list[str]] = {}
    current: list[str] = []
    for line in DOCS.read_text("utf-8").split("## The JSON")[1].splitlines():
        if heading := re.fullmatch(r" {4}(\w+(?: \w+)*)(?: {2,}.*)?", line):
            current = blocks[heading[1]] = []
        if line.startswith("    "):
            current.append(line)
    return {name: "\n".join(lines) for name, lines in blocks.items()}


def place_of(record: str) -> str:
    return PLACES.get(record, re.sub(r"(?<=.)([A-Z])", r" \1", record).lower())


@pytest.mark.parametrize("record", sorted(written()))
def test_every_key_is_named(record: str) -> None:
    place = place_of(record)
    text = described()[place]
    missing = [key for key in sorted(written()[record]) if not re.search(rf"(?<!\w){re.escape(key)}(?!\w)", text)]
    assert not missing, f"docs/evaluation.md, {place}: {missing}"


def test_nothing_else_is_described() -> None:
    assert set(described()) == {place_of(record) for record in written()}
