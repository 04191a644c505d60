"""The script that measures neoquant on a GPU runs to its end on one that is not there, and knows its goals."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from simulated_cuda.device import Counts

EVAL = Path(__file__).parents[2] / "eval"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """With little to do: small prompts, one window, no peers."""
    monkeypatch.syspath_prepend(str(EVAL / "bench"))
    monkeypatch.syspath_prepend(str(EVAL))
    monkeypatch.setitem(sys.modules, "transformers", None)
    module = importlib.import_module("gpu")
    for name, value in {
        "ROWS": (1, 5),
        "PROMPT": 300,
        "WINDOWS": 2,
        "WINDOW": 24,
        "CONTEXT": 8,
        "bandwidth": lambda device: 1e12,
    }.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "RECIPES", {"nf4": module.RECIPES["nf4"]})
    monkeypatch.setattr(module, "copies", lambda state: [state])
    return module


def test_every_part_runs(script: ModuleType, gpu: Counts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    json_path = tmp_path / "gpu.json"
    parts = ["kernels", "columns", "decode", "prefill", "evaluate", "gptq"]
    options = ["--shapes", "tiny", "--repeats", "1", "--new-tokens", "3", "--temp", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options, "--json", str(json_path), "--parts", *parts])
    script.main()
    result = json.loads(json_path.read_text())
    assert result["device"] == "simulated" and set(result["parts"]) == {
        f"tiny {part}" for part in [*parts, "models", "bytes a token"]
    }
    for name, part in result["parts"].items():
        assert "error" not in json.dumps(part), name
    assert result["goals"] == {}  # which are those of larger shapes


def test_tests_that_take_too_long_are_stopped_and_said(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    assert script.run_tests(0.01) == {"error": "not done in 0.01 seconds", "last": []}


def test_parts_share_the_time(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one leaves is for those after it."""
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    shares = script.shares(["a", "b"], ["tests", "decode"])
    assert list(shares) == ["tests", "a models", "a decode", "b models", "b decode"] and shares["tests"] == 4
    clock = importlib.import_module("clock").Clock(200.0, shares)
    assert clock.begin("tests") == 40
    now[0] += 20
    assert not clock.is_over() and clock.left() == 180
    assert clock.begin("a models") == 180 * 3 / 16
    now[0] += 100
    assert clock.is_over() and clock.begin("a decode") == 80 * 5 / 13
    now[0] += 90
    assert clock.left() == -10 and clock.begin("b models") == 0


def test_when_the_time_is_over_what_was_measured_is_kept(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    now, clock = [0.0], importlib.import_module("clock").Clock
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def step(took: float) -> float:
        now[0] += took
        if took == 3:
            raise ValueError("no memory")
        return took

    steps = {f"of {took}": lambda took=took: step(took) for took in (1, 3, 2)}
    late = {"error": "not reached: its share of the time was over"}
    failed = {"error": "ValueError: no memory"}
    assert script.timed(steps, 3, clock(100, {})) == {"of 1": 1, "of 3": failed, "of 2": 2}
    assert script.timed(steps, 3, clock(6.5, {})) == {"of 1": 1, "of 3": failed, "of 2": late}
    assert script.timed(steps, 3, clock(2, {})) == {"of 1": late, "of 3": failed, "of 2": late}


def test_what_cannot_begin_is_said(
    script: ModuleType, gpu: Counts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    json_path = tmp_path / "gpu.json"
    options = ["--shapes", "tiny", "--seconds", "0", "--temp", str(tmp_path), "--parts", "decode", "gptq"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options, "--json", str(json_path)])
    script.main()
    parts = json.loads(json_path.read_text())["parts"]
    assert set(parts) == {f"tiny {part}" for part in ("models", "bytes a token", "decode", "gptq")}
    assert all(part["found"] == {"error": "TimeoutError: not begun: 0 seconds were over"} for part in parts.values())


def test_goals_are_compared_with_what_was_measured(script: ModuleType) -> None:
    goals = importlib.import_module("gpu_goals")

    def rate(value: float) -> dict[str, float]:
        return {"tokens_per_s": value}

    decode = {
        "neoquant nf4, batch 1": rate(100), "neoquant nf4, batch 1, CUDA graph": rate(2000),
        "neoquant affine4, batch 1": rate(1000), "neoquant nf4, batch 32": rate(40000),
        "transformers nf4, batch 1": rate(100),
    }  # fmt: skip
    parts: dict[str, Any] = {
        "1.3b decode": decode,
        "1.3b bytes a token": {"neoquant nf4": 8 * 10**8},
        "1.3b kernels": {"8192x2048": {"1": {"nf4 triton": {"us": 1.0, "of_bandwidth": 0.6}}}},
        "1.3b prefill": {"neoquant nf4": rate(7), "neoquant plain": rate(10)},
        "1.3b gptq": {"seconds": 12.0},
        "1.3b evaluate": {"error": "no memory"},
    }
    result = {"read_and_write_gb_per_s": 4000.0, "parts": {name: {"found": found} for name, found in parts.items()}}
    found = goals.reached(result)
    assert {name: goal["measured"] for name, goal in found.items()} == {
        "decode 1.3b": 0.4, "decode beside": 20, "affine": 0.5, "product nf4": 0.6, "batch": 20, "prefill": 0.7,
        "gptq": 12,
    }  # fmt: skip
    assert [name for name, goal in found.items() if not goal["met"]] == ["affine", "prefill"]
    assert len(goals.table(found).splitlines()) == 2 + len(goals.GOALS)


def test_without_a_gpu_it_says_so(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is there")
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    script.main()
    assert "NOT RUN" in capsys.readouterr().out
