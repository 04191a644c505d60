"""Measuring speed: every program runs in a process of its own, and what is missing is told."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Cli

from neoquant import GPTNeoForCausalLM
from neoquant.benchmark import run, worker
from neoquant.benchmark.run import Request, Run, Speed, measure
from neoquant.cli.models import short_name
from neoquant.errors import RequestError
from neoquant.quantization.quantize import quantize
from neoquant.quantization.recipe import Recipe
from neoquant.report.measured_speed import measured_speed


def fake_worker(target: Any, job: Any, threads: int) -> dict[str, Any]:
    """Figures that say which run they are, without running anything."""
    if job["step"] == "check":
        return {"missing": ["nncf"] if job["tool"] == "openvino" else [], "versions": {"x": "1"}}
    CALLS.append(target.label)
    return dict.fromkeys(Run.model_fields, float(10 ** len([call for call in CALLS if call == target.label])))


CALLS: list[str] = []


def test_programs_take_turns_and_medians_are_told(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CALLS.clear()
    monkeypatch.setattr(run, "_call_worker", fake_worker)
    quantize(tiny_model, tmp_path / "nf4", Recipe.simple(4, "nf4"))
    quantize(tiny_model, tmp_path / "packed", Recipe.simple(4, "nf4", format="neoquant"))
    models = [str(tmp_path / name) for name in ("nf4", "packed")]
    request = Request(models, ("transformers", "openvino"), base=str(tiny_model), prompt=3, new=2)
    result = measure(request)
    labels = ["neoquant: nf4", "neoquant: packed", "transformers + bitsandbytes: nf4", "transformers: float32"]
    assert [*labels, *labels[::-1], *labels] == CALLS
    assert [program.label for program in result.programs] == labels
    assert [note.partition(", for ")[0] for note in result.notes] == ["openvino: int4: left out"]
    assert "has no nncf" in result.notes[0]
    for program in result.programs:
        assert [run.load_s for run in program.runs] == [10, 100, 1000]
        assert program.median.load_s == 100
    assert Speed.model_validate_json(result.to_json()) == result


def test_a_model_has_the_name_that_it_has_in_comparisons(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it is reached: the report finds its speed by that name."""
    monkeypatch.setattr(run, "_call_worker", fake_worker)
    quantize(tiny_model, tmp_path / "nf4", Recipe.simple(4, "nf4"))
    (tmp_path / "latest").symlink_to(tmp_path / "nf4")
    monkeypatch.chdir(tmp_path / "nf4")
    for source in (".", "../latest", "../nf4/", str(tmp_path / "latest")):
        result = measure(Request([source], prompt=3, new=2, repeats=1))
        assert list(measured_speed({"bench.json": result}).programs) == [short_name(source)] == ["nf4"]


def test_each_kind_of_activations_is_a_program(tiny_model: Path, tmp_path: Path) -> None:
    quantize(tiny_model, tmp_path / "nf4", Recipe.simple(4, "nf4"))
    models = [str(tmp_path / "nf4"), str(tiny_model)]
    result = measure(Request(models, prompt=3, new=2, repeats=1, activations=("exact", "int8")))
    plain = f"neoquant: {tiny_model.name}"
    assert [found.label for found in result.programs] == ["neoquant: nf4", "neoquant: nf4, int8 activations", plain]


UNFUSED = """
import gc, json, sys
sys.path.insert(0, sys.argv[1])
import worker
generate, _ = worker._transformers(json.loads(sys.argv[2]))()
import bitsandbytes
layers = [found for found in gc.get_objects() if isinstance(found, bitsandbytes.nn.Linear4bit)]
print(len(layers), any(layer.support_avx512bf16_for_cpu for layer in layers))
"""


def test_bitsandbytes_as_without_bf16_instructions(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program of its own, whose layers do without the product that needs them."""
    quantize(tiny_model, tmp_path / "nf4", Recipe.simple(4, "nf4"))
    with monkeypatch.context() as patched:
        patched.setattr(run, "_call_worker", fake_worker)
        result = measure(Request([str(tmp_path / "nf4")], ("transformers",), prompt=3, new=2, without_bf16=True))
    tools = [program.tool for program in result.programs]
    assert tools == ["neoquant", "bitsandbytes", "bitsandbytes-without-bf16"]
    pytest.importorskip("transformers")
    job = {"tool": tools[-1], "source": str(tmp_path / "nf4"), "threads": 1, "dtype": "float32"}
    command = [sys.executable, "-c", UNFUSED, str(run.WORKER.parent), json.dumps(job)]
    said = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()
    assert int(said[0]) > 0 and said[1] == "False"


def test_a_peer_that_fails_is_left_out_and_named(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(target: Any, job: Any, threads: int) -> dict[str, Any]:
        if job["step"] == "run" and target.tool == "transformers":
            raise RequestError(f"{target.label} failed: out of luck")
        return fake_worker(target, job, threads)

    monkeypatch.setattr(run, "_call_worker", failing)
    result = measure(Request([str(tiny_model)], ("transformers",), prompt=3, new=2))
    assert [program.tool for program in result.programs] == ["neoquant"]
    assert len(result.programs[0].runs) == 3
    assert result.notes == ["transformers: float32 failed: out of luck; left out"]


def test_the_runner_really_runs_a_model(tiny_model: Path) -> None:
    """A run of the script itself; and the loop that peers are driven by gives what our own generation gives."""
    job = {"step": "run", "tool": "neoquant", "source": str(tiny_model), "threads": 1, "dtype": "float32",
           "activations": "exact"}  # fmt: skip
    command = [sys.executable, str(run.WORKER), json.dumps(job | {"prompt": 5, "new": 6})]
    found = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert found.keys() == Run.model_fields.keys() - {"peak_device_bytes"}
    assert all(value > 0 for value in found.values())


def test_the_peers_loop_generates_greedily(tiny_model: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids = torch.tensor([[5, 9, 2]])
    chosen = []
    theirs.register_forward_hook(lambda module, args, out: chosen.append(int(out.logits[0, -1].argmax())))
    assert len(list(worker._greedy(theirs, logits_to_keep=1)(ids, 7))) == 7
    ours = GPTNeoForCausalLM.from_pretrained(tiny_model)
    assert chosen == ours.generate(ids, max_new_tokens=7, eos_token_id=[])[0, 3:].tolist()


class Newer(torch.nn.Module):
    """Its next token is how many it has seen; it knows its cache by transformers' name since 5.24."""

    def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool, cache: int | None = None) -> Any:
        seen = (cache or 0) + input_ids.shape[1]
        assert attention_mask.shape[1] == seen and use_cache
        return SimpleNamespace(logits=torch.eye(16)[None, seen, None], cache=seen)


class Older(Newer):
    """The same under the older name, which optimum's models keep."""

    def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool, past_key_values: int | None = None) -> Any:
        out = super().forward(input_ids, attention_mask, use_cache, past_key_values)
        return SimpleNamespace(logits=out.logits, past_key_values=out.cache)


@pytest.mark.parametrize("peer", [Newer, Older])
def test_the_peers_loop_names_the_cache_as_the_peer_does(peer: type[torch.nn.Module]) -> None:
    assert len(list(worker._greedy(peer())(torch.tensor([[5, 9, 2]]), 7))) == 7


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"against": ["llama"]}, "no peer 'llama'; there are transformers, openvino"),
        ({"new": 1}, "new tokens: 1; legal is at least 2"),
        ({"prompt": 4000}, "4000 \\+ 64 tokens; the context of .* is 32"),
        ({"dtype": "int8"}, "dtype is 'int8'; legal are"),
        ({"device": "tpu"}, "device is 'tpu'; legal are"),
        ({"device": "cuda:99"}, "device is 'cuda:99', but this machine has"),
        ({"activations": ["int4"]}, "activations are 'int4'; legal are exact and int8"),
        ({"activations": ["int8"], "prompt": 4, "new": 4}, "no weight of .* is quantized"),
        ({"against": ["openvino"], "pythons": {"openvino": "/nowhere/python"}, "prompt": 4, "new": 4}, "cannot be run"),
    ],
)
def test_what_cannot_be_measured_is_named(tiny_model: Path, request_: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        measure(Request([str(tiny_model)], **request_))


def test_a_context_that_config_json_leaves_open_is_transformers_default(tiny_model: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(tiny_model, tmp_path / "open"))
    config = json.loads((copied / "config.json").read_text()) | {"max_position_embeddings": None}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match=r"4000 \+ 64 tokens; the context of .* is 2048"):
        measure(Request([str(copied)], prompt=4000))


def test_a_format_that_only_we_read_needs_the_plain_model_for_peers(tiny_model: Path, tmp_path: Path) -> None:
    quantize(tiny_model, tmp_path / "packed", Recipe.simple(4, "nf4", format="neoquant"))
    with pytest.raises(
        RequestError, match="transformers does not read the format packed: name the plain model as the base"
    ):
        measure(Request([str(tmp_path / "packed")], ("transformers",), prompt=3, new=2))


def test_a_program_that_fails_says_why(tmp_path: Path) -> None:
    target = run._Target("neoquant: gone", "neoquant", str(tmp_path / "gone"), sys.executable)
    job = {"step": "run", "tool": "neoquant", "source": target.source, "threads": 1, "dtype": "float32",
           "activations": "exact"}  # fmt: skip
    with pytest.raises(RequestError, match=r"neoquant: gone failed: .*there is no folder"):
        run._call_worker(target, job | {"prompt": 3, "new": 2}, 1)


def test_the_verb(cli: Cli, tmp_path: Path) -> None:
    found = cli("bench", "neoquant-demo", "--prompt-tokens", "4", "--new-tokens", "3", "--repeats", "1",
                "--against", "openvino", "--json", tmp_path / "speed.json")  # fmt: skip
    assert found.code == 0, found
    assert "neoquant: neoquant-demo" in found.out and "prefill tok/s" in found.out
    assert Speed.model_validate_json((tmp_path / "speed.json").read_text()).repeats == 1
    assert "--python 'openvino'" in cli("bench", "neoquant-demo", "--python", "openvino").error
