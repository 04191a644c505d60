"""Holds the code to the picture in docs/architecture.md: imports run one way, and nothing heavy is imported early."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "neoquant"
PICTURE = REPOSITORY / "docs" / "architecture.md"

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


LOOSE_MODULES = 8
"""At most so many files beside the packages at the top of `neoquant/`."""


class Import(NamedTuple):
    """One import statement: where it stands, the module that it names, and whether it runs only in a function."""

    file: str
    line: int
    module: str
    deferred: bool


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name; a package stands for its `__init__`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("neoquant", *path.relative_to(PACKAGE).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def levels() -> list[list[str]]:
    """The levels of the picture, each with its packages."""
    lines = PICTURE.read_text(encoding="utf-8").split("independent of each other:")[1].split("`tests/unit")[0]
    return [[name.strip() for name in level.split("|")] for level in lines.split("->")]


def layout() -> set[str]:
    """What the layout of `docs/architecture.md` names at the top of `neoquant/`."""
    block = PICTURE.read_text(encoding="utf-8").split("## Layout")[1].split("    recipes/")[0]
    names = re.findall(r"^      (\S+?)(?:/|\.py)", block, re.MULTILINE) + re.findall(r"· (\w+)\.py", block)
    return set(names)


def imports(tree: ast.AST, file: str, deferred: bool = False) -> Iterator[Import]:
    """Every import under `tree`: in functions and for type checkers, too."""
    for node in ast.iter_child_nodes(tree):
        inside = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.Import):
            yield from (Import(file, node.lineno, alias.name, deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield Import(file, node.lineno, whole if whole in modules() else str(node.module), deferred)
        else:
            yield from imports(node, file, inside)


@cache
def all_imports() -> tuple[Import, ...]:
    found: list[Import] = []
    for path in modules().values():
        file = path.relative_to(PACKAGE).as_posix()
        found += imports(ast.parse(path.read_text(encoding="utf-8")), file)
    return tuple(found)


def package(module: str) -> str:
    """`model` for neoquant.model.gpt_neo, `errors` for neoquant.errors, `__init__` for neoquant itself."""
    return module.removeprefix("neoquant").lstrip(".").split(".")[0] or "__init__"


def own_imports() -> Iterator[tuple[str, str, Import]]:
    """Every import of one module of the package by another, but for those by the list of public names."""
    names = {path.relative_to(PACKAGE).as_posix(): name for name, path in modules().items()}
    for found in all_imports():
        if names[found.file] != "neoquant" and found.module in modules() and found.module != "neoquant":
            yield names[found.file], found.module, found


def rings(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of nodes each of which can be reached from itself."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [error.args[1]]
    return []


def test_every_package_is_in_the_picture_and_the_layout() -> None:
    parts = {package(name) for name in modules()}
    assert parts - {"__init__"} == {name for level in levels() for name in level}
    assert parts == layout()


def test_few_modules_lie_beside_the_packages() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= LOOSE_MODULES


def test_imports_run_one_way() -> None:
    height = {name: number for number, level in enumerate(levels()) for name in level}
    wrong = [
        f"neoquant/{found.file}:{found.line}: {package(source)} must not import {package(target)}"
        for source, target, found in own_imports()
        if package(source) != package(target) and height[package(target)] >= height[package(source)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_imports_form_a_ring() -> None:
    files: dict[str, set[str]] = {name: set() for name in modules()}
    for source, target, _ in own_imports():
        files[source].add(target)
    assert rings(files) == []


def test_rings_are_found() -> None:
    assert rings({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) != []
    assert rings({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def test_the_readme_names_every_package() -> None:
    tree = (
        (REPOSITORY / "README.md").read_text(encoding="utf-8").split("## Where things are")[1].split("    recipes/")[0]
    )
    named = set(re.findall(r"^      (\w+)/", tree, re.MULTILINE))
    assert named == {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}


def test_the_package_runs_without_its_oracles() -> None:
    """But for the script that measures them, which runs in a process of its own, and the room that lives in them."""
    oracles = [found for found in all_imports() if found.module.split(".")[0] in ORACLES]
    inside = [found for found in oracles if found.file.startswith("transformers/")]
    assert {found.file for found in oracles if found not in inside} == {"benchmark/worker.py"}
    assert all(found.deferred for found in oracles if found not in inside)
    assert not [
        found
        for _, target, found in own_imports()
        if package(target) == "transformers" and package(_) != "transformers"
    ]


@pytest.mark.parametrize("module", ["neoquant", "neoquant.errors", "neoquant.progress", "neoquant.cli"])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_no_two_classes_have_one_name() -> None:
    homes = defaultdict(list)
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(module)
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}
