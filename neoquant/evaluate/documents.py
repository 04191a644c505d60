"""Reading the documents of a suite, one at a time, whatever holds them."""

from __future__ import annotations

import importlib
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from neoquant.errors import DataError


@dataclass(frozen=True)
class Document:
    """One text, and the subset that its score counts towards."""

    id: str
    subset: str
    text: str


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
                raise DataError(f"this Python's pydoc has no topic {name!r} (for example {', '.join(sorted(known)[:3])})")
            yield Document(name, subset, known[name])


def module_path(name: str) -> Path:
    """Where the standard library keeps the source of module `name`; found without importing it."""
    stem = Path(sysconfig.get_path("stdlib"), *name.split("."))
    for path in (stem.with_suffix(".py"), stem / "__init__.py"):
        if path.is_file():
            return path
    raise DataError(f"this Python's standard library has no source of module {name!r} (looked for {stem}.py)")
