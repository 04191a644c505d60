"""What keeps Triton's programs from running is said, and something else computes."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
import torch

from neoquant.triton import running


@pytest.fixture(autouse=True)
def as_if_new(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton is installed, and nobody has asked yet; what is answered is forgotten."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(running, "find_spec", lambda name: object())
    running.lacking.cache_clear()
    yield
    running.lacking.cache_clear()


ERRORS = {
    "no compiler": RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
    "no headers": subprocess.CalledProcessError(1, ["gcc", "driver.c"]),
    "a compiler that is not there": FileNotFoundError(2, "No such file or directory", "/opt/cc"),
    "nothing said": RuntimeError(),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_gpu_without_what_starts_programs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def find() -> object:
        raise ERRORS[name]

    monkeypatch.setattr(running, "find_driver", find)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert running.lacking() is None  # which compiles ahead of time alone
    running.lacking.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reason = running.lacking()
    assert reason is not None and "\n" not in reason
    assert "C compiler and Python's headers" in reason and (str(ERRORS[name]).strip() or "RuntimeError") in reason


def test_tritons_own_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: make test-triton")
    if torch.cuda.is_available():
        assert running.lacking() is None
    else:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert "Triton cannot start programs here" in (running.lacking() or "")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "find_spec", lambda name: None)
    assert "triton is not installed" in (running.lacking() or "")
