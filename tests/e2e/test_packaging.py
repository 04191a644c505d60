"""What is installed: the wheel and the source distribution hold all of the package and nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

from neoquant.files.reading import read_toml

MADE = ("__pycache__", "*.so", "*.pyc")
BUILD = "from setuptools import build_meta as b; print(b.build_wheel({out!r})); print(b.build_sdist({out!r}))"
MEGABYTE = 1_000_000


def sources(suffix: str) -> set[str]:
    """The package's files as they are installed."""
    homes = {"neoquant": "neoquant", "eval/suites": "neoquant/data/suites", "recipes": "neoquant/quantization/recipes"}
    found = set()
    for home, installed in homes.items():
        for path in (REPOSITORY / home).rglob(f"*{suffix}"):
            found.add(f"{installed}/{path.relative_to(REPOSITORY / home).as_posix()}")
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[zipfile.ZipFile, tarfile.TarFile]]:
    """A wheel and a source distribution of this tree, with the native library that it has already, if any."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("neoquant", "eval/suites", "recipes"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns(*MADE))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy / name)
    libraries = list((REPOSITORY / "neoquant" / "native").glob("*.so"))
    for library in libraries:
        shutil.copyfile(library, copy / "neoquant" / "native" / library.name)  # newer than its sources: taken as it is
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {} if libraries else {"NEOQUANT_NO_EXTENSION": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BUILD.format(out=str(out))], cwd=copy, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel, tarfile.open(next(out.glob("*.tar.gz"))) as source:
        yield wheel, source


def test_the_wheel_holds_the_package_and_nothing_else(built: tuple[zipfile.ZipFile, tarfile.TarFile]) -> None:
    names = set(built[0].namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"neoquant"}
    for suffix in (".py", ".toml", ".j2", ".c", ".h", ".so", ".safetensors", "py.typed"):
        held = {name for name in names if name.endswith(suffix) and ".dist-info/" not in name}
        assert held == sources(suffix), suffix
    assert sources(".py") and sources(".safetensors") and sources(".toml")
    assert built[0].filename is not None and Path(built[0].filename).stat().st_size < 16 * MEGABYTE


def test_one_wheel_serves_every_python(built: tuple[zipfile.ZipFile, tarfile.TarFile]) -> None:
    libraries = [name for name in built[0].namelist() if name.endswith(".so")]
    (tags,) = (name for name in built[0].namelist() if name.endswith(".dist-info/WHEEL"))
    assert ("Tag: cp310-abi3-" if libraries else "Tag: py3-none-any") in built[0].read(tags).decode()
    for library in libraries:
        assert not re.search(rb"\0_?Py[A-Z]\w+\0", built[0].read(library)), "a name of Python's that would be called"


def test_the_source_distribution_can_be_built(built: tuple[zipfile.ZipFile, tarfile.TarFile]) -> None:
    names = {name.partition("/")[2] for name in built[1].getnames()}
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE"} <= names
    for home in ("neoquant", "eval/suites", "recipes"):
        for path in (REPOSITORY / home).rglob("*"):
            if path.suffix in (".py", ".c", ".h", ".toml", ".j2", ".safetensors"):
                assert path.relative_to(REPOSITORY).as_posix() in names
    assert not any(name.startswith(("tests", "docs", "eval/results")) or name.endswith(".so") for name in names)


def test_what_is_installed_runs(built: tuple[zipfile.ZipFile, tarfile.TarFile], tmp_path: Path) -> None:
    """The package out of the wheel, with its model, suites and recipes."""
    built[0].extractall(tmp_path / "installed")
    script = (
        "import neoquant, sys; from neoquant.cli import main; print(neoquant.__file__); sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "plan", "neoquant-demo", "--recipe", "nf4"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "installed"))
    assert "per weight of the linear layers" in done.stdout


def test_building_asks_for_no_torch() -> None:
    project = read_toml(REPOSITORY / "pyproject.toml")
    assert project["build-system"]["requires"] == ["setuptools>=77"]
    assert "import torch" not in (REPOSITORY / "setup.py").read_text()
