"""What the bundled model learns from: this Python's standard library, less what the suite `demo` holds out."""

from __future__ import annotations

import importlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomllib

from neoquant.data.documents import Document, module_path, stdlib_documents

SUITE = Path(__file__).parents[1] / "suites" / "demo.toml"
# Tables of character codes and generated opcodes: no prose, and little that deserves the name of source.
TABLES = ("encodings", "__pycache__", "site-packages", "lib-dynload", "config-")
# A paragraph of at least this many characters that also stands in a held-out document is left out of training.
PARAGRAPH = 200


def held_out() -> list[Document]:
    """The documents of the suite `demo`."""
    data: dict[str, Any] = tomllib.loads(SUITE.read_text("utf-8"))["data"]
    return list(stdlib_documents(data["modules"], data["topics"]))


def training_documents() -> list[Document]:
    """Every other module, text file and help topic; subset `tests` for the test package, else `library`."""
    data = tomllib.loads(SUITE.read_text("utf-8"))["data"]
    modules = [name for names in data["modules"].values() for name in names]
    topics = {name for names in data["topics"].values() for name in names}
    forbidden = {paragraph for document in held_out() for paragraph in _paragraphs(document.text)}
    documents = [*_files(modules), *_topics(topics)]
    return [Document(d.id, d.subset, _without(d.text, forbidden)) for d in documents]


def _files(modules: list[str]) -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = {module_path(name) for name in modules}
    tests = {"test_" + name.split(".")[-1] for name in modules} | {"test_" + name.split(".")[0] for name in modules}
    for path in sorted((*root.rglob("*.py"), *root.rglob("*.txt"))):
        where = path.relative_to(root)
        if path in paths or where.parts[:2] == ("pydoc_data", "topics.py"):
            continue
        if any(part.startswith(TABLES) for part in where.parts) or tests & {where.stem, *where.parts[:-1]}:
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # a handful of test files are broken on purpose
        is_test = where.parts[0] == "test" or "tests" in where.parts or "idle_test" in where.parts
        yield Document(str(where), "tests" if is_test else "library", text)


def _topics(without: set[str]) -> Iterator[Document]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics.keys() - without):
        yield Document(f"topic {name}", "library", topics[name])


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in text.split("\n\n"):
        if len(paragraph.strip()) >= PARAGRAPH:
            yield paragraph.strip()


def _without(text: str, forbidden: set[str]) -> str:
    return "\n\n".join(p for p in text.split("\n\n") if p.strip() not in forbidden)
