"""What a calibrated run is said to take: grows with what it grows with, and is near what one takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import neoquant
from neoquant import Recipe, demo
from neoquant.calibration import memory as costs
from neoquant.calibration.memory import Methods, estimate_memory, guess_search_seconds, guess_seconds
from neoquant.errors import RequestError
from neoquant.model.config import GPTNeoConfig

CONFIG = GPTNeoConfig.from_dict(json.loads((demo.MODEL / "config.json").read_text("utf-8")))
GPTQ4 = Recipe.simple(4, "affine", quantizer="gptq")

RUN = """
import sys, torch, neoquant
from neoquant.calibration.dataset import Calibration
torch.set_num_threads(1)
ids = torch.randint(0, 4000, (64, 512), generator=torch.Generator().manual_seed(0))
recipe = neoquant.Recipe.simple(4, "affine", quantizer="gptq")
print(neoquant.quantize(None, sys.argv[1], recipe, calibration=Calibration(ids, "x", "", 0)).peak_rss_bytes)
"""


def test_grows_with_the_text_and_not_with_it_in_files() -> None:
    few, many = estimate_memory(CONFIG, 8, 512), estimate_memory(CONFIG, 4000, 512)
    assert few.memory < many.memory and few.disk < many.disk and not many.spilled
    spilled = estimate_memory(CONFIG, 4000, 512, max_memory=many.memory - 1)
    assert spilled.spilled and spilled.memory < many.memory
    assert estimate_memory(CONFIG, 8000, 512, max_memory=many.memory - 1).memory == spilled.memory
    with pytest.raises(RequestError, match=r"for one block, more than the 100\.0 MB it may take"):
        estimate_memory(CONFIG, 8, 512, max_memory=100_000_000)


def test_time_follows_the_multiplications(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "_rate", lambda device: 1e9)
    assert guess_seconds(CONFIG, 16, 512) < guess_seconds(CONFIG, 32, 512) < 2 * guess_seconds(CONFIG, 16, 512)
    coupled, plain = (guess_search_seconds(10**9, Methods(gradients=each)) for each in (True, False))
    assert coupled > 10 * plain > 0 == guess_search_seconds(0, Methods())
    monkeypatch.undo()
    assert 0 < guess_seconds(CONFIG, 16, 512) < 3600


def test_plans_say_it_where_text_is_seen() -> None:
    plain = neoquant.plan(None, Recipe.simple())
    assert plain.calibrating is None
    seen = neoquant.plan(None, GPTQ4, calibration_rows=4000)
    assert seen.calibrating is not None and (seen.calibrating.rows, seen.calibrating.length) == (4000, 512)
    assert seen.peak_memory_bytes == seen.calibrating.memory
    with pytest.raises(RequestError, match="for one block"):
        neoquant.plan(None, GPTQ4, max_memory=1)


def test_memory_is_near_what_a_run_takes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    foreseen = estimate_memory(CONFIG, 64, 512).memory
    assert 0.7 * foreseen < int(done.stdout) < 1.3 * foreseen
