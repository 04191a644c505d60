"""What only a process of its own shows: pipes, terminals that know no UTF-8, what is imported, what is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHON = (sys.executable, "-m", "neoquant")
HEAVY = ("torch", "numpy", "pydantic", "datasets", "bitsandbytes", "rich")


def test_help_imports_nothing_heavy() -> None:
    for words, heavy in (([], HEAVY), (["quantize", "--help"], set(HEAVY) - {"pydantic"})):  # typer's converter
        code = f"import sys; from neoquant.cli import main; main({words})\n"
        code += f"print([name for name in {heavy!r} if name in sys.modules])"
        printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert printed.endswith("[]\n")


def test_a_reader_that_leaves_is_no_error(tiny_model: Path) -> None:
    process = subprocess.Popen([*PYTHON, "info", tiny_model], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1


def test_a_closed_stdout_is_no_error(tiny_model: Path) -> None:
    command = f'exec "{sys.executable}" -m neoquant info "{tiny_model}" >&-'
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE)
    assert done.returncode == 0 and done.stderr == b""


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_a_closed_stdin_is_an_empty_one(tiny_model: Path, verb: str) -> None:
    command = f'exec "{sys.executable}" -m neoquant {verb} "{tiny_model}" --seed 1 --max-new-tokens 3'
    closed, empty = (
        subprocess.run(f"{command} {where}", shell=True, capture_output=True) for where in ("<&-", "</dev/null")
    )
    assert closed.returncode == empty.returncode == 0
    assert closed.stdout == empty.stdout and b"error" not in closed.stderr


def test_a_terminal_without_utf8_does_not_crash(tiny_model: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [*PYTHON, "generate", tiny_model, "--prompt", "π ≈ 3", "--max-new-tokens", "4", "--greedy"]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0 and done.stdout.startswith(b"? ? 3")


@pytest.mark.parametrize(
    ("typed", "number", "expected"), [("neoquant qua", 1, {"quantize"}), ("neoquant plan --group", 2, {"--group-size"})]
)
def test_a_shell_completes_verbs_and_options(typed: str, number: int, expected: set[str]) -> None:
    asked = {"_NEOQUANT_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(number)}
    done = subprocess.run(PYTHON, capture_output=True, text=True, env=os.environ | asked)
    assert set(done.stdout.split()) == expected and not done.stderr


SPINS = """
import os
from neoquant.cli import run
try:
    run()
finally:
    print(os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("given", "verb", "expected"),
    [
        ({}, "quantize", "10000"),
        ({"GOMP_SPINCOUNT": "7"}, "quantize", "7"),
        ({"OMP_WAIT_POLICY": "active"}, "quantize", "None"),
        ({}, "bench", "None"),
    ],
)
def test_openmp_is_told_to_wait_briefly_where_nothing_else_is_said(
    given: dict[str, str], verb: str, expected: str
) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", SPINS, verb, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=kept | given, check=True)
    assert done.stdout.splitlines()[-1] == expected


ELSEWHERE = """
import sys
sys.modules.update(fcntl=None, resource=None)
from neoquant.cli import run
run()
"""


def test_what_windows_lacks_is_not_needed(tiny_model: Path, tmp_path: Path) -> None:
    """Without fcntl, resource and the native library: quantize, replace, calibrate, evaluate and generate."""
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike. " * 40)
    out = tmp_path / "out"
    verbs = [
        ["quantize", tiny_model, "--bits", "4", "--type", "nf4", "--out", out],
        ["quantize", tiny_model, "--bits", "4", "--type", "gptq", "--group-size", "16", "--out", out, "--force"],
        ["eval", out, "--data", text, "--context", "16", "--json", tmp_path / "result.json"],
        ["generate", out, "--prompt", "All", "--max-new-tokens", "4", "--greedy"],
    ]
    verbs[1] += ["--calibration", text, "--rows", "2", "--length", "16"]
    for words in verbs:
        command = [sys.executable, "-c", ELSEWHERE, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NEOQUANT_ISA": "off"})
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "result.json").is_file() and done.stdout.startswith("All")


@pytest.mark.slow
def test_an_installed_copy_is_whole(tmp_path: Path) -> None:
    """A wheel holds suites, recipes and the bundled model, and runs from anywhere."""
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(
        ".git", ".venv", ".*_cache", "__pycache__", "build", "*.egg-info", "*.so", "results"
    )
    shutil.copytree(REPOSITORY, source, ignore=ignore)
    code = f"import setuptools.build_meta as b; print(b.build_wheel({str(tmp_path)!r}))"
    without_library = os.environ | {"NEOQUANT_NO_EXTENSION": "1"}  # compiling takes minutes, and has a test of its own
    subprocess.run([sys.executable, "-c", code], cwd=source, env=without_library, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {path.relative_to(source).as_posix() for path in (source / "neoquant").rglob("*") if path.is_file()}
    for kept, where in (("eval/suites", "neoquant/data/suites"), ("recipes", "neoquant/quantization/recipes")):
        expected |= {f"{where}/{path.name}" for path in (source / kept).glob("*.toml")}
    assert expected <= names
    code = "import neoquant.demo as d, neoquant.data.suite as s; print(d.__file__, s.suite_names())"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert str(tmp_path) in done.stdout and "'demo'" in done.stdout
