"""`neoquant bench --device cuda`: what a worker process does there, and what is said of it."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import write_tiny_model

from neoquant.benchmark import run, worker
from neoquant.benchmark.run import Request, Run, measure
from neoquant.errors import RequestError
from neoquant.report.benchmark import speed_table
from neoquant.report.measured_speed import measured_speed
from simulated_cuda.device import MEMORY, Counts


@pytest.mark.parametrize("static", [False, True])
def test_a_worker_runs_on_the_device(
    static: bool, tmp_path: Path, gpu: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count(1)  # by a clock that counts launches: seconds of a few tokens are lost in a busy machine's
    clock = SimpleNamespace(perf_counter=lambda: gpu.launches.total() + 1e-3 * next(ticks))
    monkeypatch.setattr(worker, "time", clock)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    job = {"step": "run", "tool": "neoquant", "source": str(write_tiny_model(tmp_path / "tiny")), "threads": 1}
    job |= {"dtype": "float32", "activations": "exact", "prompt": 5, "new": 6, "batch": 2}
    found = worker.run(job | {"device": "cuda:0", "static_cache": static})
    assert found.keys() == Run.model_fields.keys() and all(value > 0 for value in found.values())
    assert found["peak_device_bytes"] == Run(**found).peak_bytes == MEMORY // 2
    replays = sum(count for line, count in gpu.launches.items() if line.startswith("generation/cuda_graph.py"))
    assert (replays > 5) == static


def test_the_peers_loop_runs_there(tmp_path: Path, gpu: Counts) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(write_tiny_model(tmp_path / "tiny"), dtype=torch.float32)
    generate = worker._greedy(theirs.to("cuda"), logits_to_keep=1)
    with torch.inference_mode():
        first, rest = worker.timed_on_gpu(generate, torch.ones(2, 5, dtype=torch.int64, device="cuda"), 4)
    assert first > 0 and first + rest > 0


def test_the_device_is_said(tmp_path: Path, gpu: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    source, jobs = str(write_tiny_model(tmp_path / "tiny")), []

    def fake_worker(target: Any, job: Any, threads: int) -> dict[str, Any]:
        if job["step"] == "check":
            return {"missing": [], "versions": {}}
        jobs.append(job)
        return dict.fromkeys(Run.model_fields, 1e6)

    monkeypatch.setattr(run, "_call_worker", fake_worker)
    result = measure(Request([source], device="cuda", dtype="bfloat16", static_cache=True, prompt=3, new=2, repeats=1))
    assert (jobs[0]["device"], jobs[0]["static_cache"]) == ("cuda:0", True)
    assert result.device == "simulated"
    assert measured_speed({"bench.json": result}).settings.endswith("CUDA graphs, on simulated")
    legend = str(speed_table(result).renderables[-1])  # type: ignore[attr-defined]
    assert "CUDA graphs, on simulated" in legend
    with pytest.raises(RequestError, match="openvino is measured on the CPU, not on cuda"):
        Request([source], ("openvino",), device="cuda")
