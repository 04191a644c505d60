"""Holds the code to the picture in docs/architecture.md: imports run one way, and nothing heavy is imported early."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "neoquant"
PICTURE = REPOSITORY / "docs" / "architecture.md"

UPWARD_BUT_DEFERRED = {
    ("model/pretrained.py", "loading"),
    ("model/pretrained.py", "onload"),
    ("model/tokenizer.py", "loading"),
}
"""`from_pretrained` needs whoever reads checkpoints, quantized or not: imported inside the function."""

ORACLES = {"transformers", "accelerate", "optimum"}
"""What tests compare with; the package must run without them."""

HEAVY = (
    "torch",
    "numpy",
    "pydantic",
    "datasets",
    "bitsandbytes",
    "huggingface_hub",
    "tokenizers",
    "matplotlib",
    "rich",
)
"""What takes tenths of a second to import, and so waits until a verb needs it."""


class Import(NamedTuple):
    """One import statement: where it stands, what it names, and whether it runs only when a function is called."""

    file: str
    line: int
    module: str
    deferred: bool


def rooms() -> list[list[set[str]]]:
    """The levels of the picture, each with its rooms: names in one room may import each other, rooms may not."""
    indented = [
        line for line in PICTURE.read_text().split("Imports run one way:")[1].splitlines() if line[:4] == "    "
    ]
    levels = " ".join(indented).split("->")
    return [[{name.strip() for name in room.split(",")} for room in level.split("|")] for level in levels]


def imports(tree: ast.AST, file: str, deferred: bool = False) -> Iterator[Import]:
    """Every import under `tree`, except those for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        inside = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.Import):
            yield from (Import(file, node.lineno, alias.name, deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            names = [f"neoquant.{alias.name}" for alias in node.names] if node.module == "neoquant" else [node.module]
            yield from (Import(file, node.lineno, str(name), deferred) for name in names)
        else:
            yield from imports(node, file, inside)


def all_imports() -> list[Import]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        found += imports(ast.parse(path.read_text(encoding="utf-8")), file)
    return found


def room_names() -> set[str]:
    return {name for level in rooms() for room in level for name in room}


def place(name: str) -> tuple[int, int]:
    """Level and room of a name in the picture."""
    return next(
        (height, number) for height, level in enumerate(rooms()) for number, room in enumerate(level) if name in room
    )


def part(file: str) -> str:
    """`model` for model/gpt_neo.py, `planning` for planning.py."""
    return file.split("/")[0].removesuffix(".py")


def test_every_part_is_in_the_picture() -> None:
    parts = {part(path.relative_to(PACKAGE).as_posix()) for path in PACKAGE.rglob("*.py")}
    assert parts - {"__init__", "__main__"} <= room_names()


def test_imports_run_one_way() -> None:
    wrong = []
    for found in all_imports():
        source, target = part(found.file), found.module.removeprefix("neoquant.").split(".")[0]
        if source in ("__init__", "__main__") or not found.module.startswith("neoquant.") or target not in room_names():
            continue
        if found.deferred and (found.file, target) in UPWARD_BUT_DEFERRED:
            continue
        (height, room), (target_height, target_room) = place(source), place(target)
        if target_height > height or (target_height == height and target_room != room):
            wrong.append(f"neoquant/{found.file}:{found.line}: {source} must not import {target}")
    assert not wrong, "\n".join(wrong)


def test_the_package_runs_without_its_oracles() -> None:
    """But for the script that measures them, which runs in a process of its own."""
    oracles = [found for found in all_imports() if found.module.split(".")[0] in ORACLES]
    assert {found.file for found in oracles} == {"evaluation/speed_runner.py"}
    assert all(found.deferred for found in oracles)


@pytest.mark.parametrize("module", ["neoquant", "neoquant.errors", "neoquant.progress", "neoquant.cli"])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
