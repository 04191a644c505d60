"""Tests that this machine cannot run are deselected and counted, with and without pytest-xdist."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

CONFTEST = Path(__file__).parents[1] / "conftest.py"
MACHINE = """
def has_cuda():
    return False


def runnable_isas():
    return ["portable", "avx2"]
"""
TESTS = """
import pytest


@pytest.mark.gpu
@pytest.mark.parametrize("i", range(1200))
def test_gpu(i):
    assert False


@pytest.mark.parametrize("isa", [pytest.param(isa, marks=pytest.mark.isa(isa)) for isa in ("portable", "avx2", "neon")])
def test_isa(isa):
    assert isa != "neon"


def test_anywhere():
    pass
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeini("[pytest]\nmarkers =\n    gpu\n    isa(name)\n")
    pytester.makeconftest(CONFTEST.read_text() + MACHINE)
    pytester.makepyfile(test_some=TESTS)
    return pytester


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_run_is_counted_once(project: pytest.Pytester, workers: int) -> None:
    result = project.runpytest_subprocess("-p", "no:cacheprovider", "-n", str(workers))
    result.assert_outcomes(passed=3, deselected=1201 if workers == 0 else 0)  # xdist itself does not count them
    assert [line for line in result.outlines if line.startswith("NOT RUN")] == [
        "NOT RUN: 1,200 tests need a CUDA device (make test-gpu)",
        "NOT RUN: 1 test needs the instruction set neon (this machine runs portable, avx2)",
    ]


def test_only_what_was_asked_for_is_counted(project: pytest.Pytester) -> None:
    result = project.runpytest_subprocess("-p", "no:cacheprovider", "-k", "anywhere or neon")
    result.assert_outcomes(passed=1, deselected=1203)
    assert [line for line in result.outlines if line.startswith("NOT RUN")] == [
        "NOT RUN: 1 test needs the instruction set neon (this machine runs portable, avx2)"
    ]
