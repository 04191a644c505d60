"""One measurement of one tool, in a process of its own: load a model, read a prompt, generate greedily.

A script, not a module: `run.py` starts it by its path, perhaps with another interpreter, which need not have neoquant.
So nothing but the standard library is imported before the tool is known.

    python worker.py '{"step": "run", "tool": "transformers", "source": "folder", ...}'

prints one line of JSON: seconds of importing, loading and reading the prompt, tokens per second, peak memory in bytes,
and on a GPU that of the device.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REQUIRED = {
    "neoquant": ("neoquant",),
    "transformers": ("transformers", "torch"),
    "bitsandbytes": ("transformers", "torch", "bitsandbytes", "accelerate"),
    "bitsandbytes-without-bf16": ("transformers", "torch", "bitsandbytes", "accelerate"),
    "openvino": ("optimum.intel", "openvino", "nncf"),
}
"""Modules that a tool must be able to import."""

WARM_UP = 4  # tokens generated before anything is timed: threads start, buffers are allocated

Generate = Callable[[Any, int], Iterator[None]]
"""(ids int64[B, T], new tokens): yields after every position."""


def main() -> None:
    job = json.loads(sys.argv[1])
    steps: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"check": check, "export": export, "run": run}
    print(json.dumps(steps[job["step"]](job)))


def check(job: dict[str, Any]) -> dict[str, Any]:
    """Which of the packages that the tool needs are missing here, and the versions of the others."""
    missing = [name for name in REQUIRED[job["tool"]] if not _exists(name)]
    found = [name.replace(".", "-") for name in REQUIRED[job["tool"]] if name not in missing]
    return {"missing": missing, "versions": {name: _version(name) for name in found}}


def export(job: dict[str, Any]) -> dict[str, Any]:
    """OpenVINO's int4 model of a plain checkpoint, as optimum-intel makes it, into a folder."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    config = OVWeightQuantizationConfig(bits=4, sym=False, group_size=64, ratio=1.0)
    model = OVModelForCausalLM.from_pretrained(job["source"], export=True, quantization_config=config)
    model.save_pretrained(job["out"])
    return {}


def run(job: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    load = {
        "neoquant": _neoquant,
        "transformers": _transformers,
        "bitsandbytes": _transformers,
        "bitsandbytes-without-bf16": _transformers,
        "openvino": _openvino,
    }[job["tool"]](job)
    imported = time.perf_counter()
    generate, vocabulary = load()
    loaded = time.perf_counter()

    import torch

    rows = job.get("batch", 1)
    ids = torch.randint(0, vocabulary, (rows, job["prompt"]), generator=torch.Generator().manual_seed(0))
    device = job.get("device", "cpu")
    ids = ids.to(device)
    for _ in generate(ids[:, : min(WARM_UP, job["prompt"])], WARM_UP):
        pass
    prefill, decode = (timed if device == "cpu" else timed_on_gpu)(generate, ids, job["new"])
    found = {
        "import_s": imported - started,
        "load_s": loaded - imported,
        "prefill_s": prefill,
        "prefill_tokens_per_s": rows * job["prompt"] / prefill,
        "decode_tokens_per_s": rows * (job["new"] - 1) / decode,
        "peak_rss_bytes": _peak_rss_bytes(),
    }
    return found if device == "cpu" else found | {"peak_device_bytes": torch.cuda.max_memory_allocated(ids.device)}


def timed(generate: Generate, ids: Any, new: int) -> tuple[float, float]:
    """Seconds until the first token, and from there to the last."""
    began = time.perf_counter()
    times = [time.perf_counter() for _ in generate(ids, new)]
    return times[0] - began, times[-1] - times[0]


def timed_on_gpu(generate: Generate, ids: Any, new: int) -> tuple[float, float]:
    """The same where the host is ahead of the device, and is told of several tokens together."""
    import torch

    took = []
    for count in (1, new):
        torch.cuda.synchronize(ids.device)
        began = time.perf_counter()
        for _ in generate(ids, count):
            pass
        torch.cuda.synchronize(ids.device)
        took.append(time.perf_counter() - began)
    return took[0], took[1] - took[0]


def _neoquant(job: dict[str, Any]) -> Callable[[], tuple[Generate, int]]:
    import torch

    from neoquant.generation.generate import stream
    from neoquant.loading.load import load_model
    from neoquant.loading.pretrained import GPTNeoForCausalLM

    torch.set_num_threads(job["threads"])

    def load() -> tuple[Generate, int]:
        options = {"dtype": job["dtype"], "activations": job["activations"]}
        model = load_model(job["source"], GPTNeoForCausalLM, device=job.get("device", "cpu"), **options)
        held = {"cache_dtype": job.get("cache"), "static_cache": job.get("static_cache", False)}

        def generate(ids: Any, new: int) -> Iterator[None]:
            for _ in stream(model, ids, max_new_tokens=new, steady=True, **held):
                yield None

        return generate, model.config.vocab_size

    return load


def _transformers(job: dict[str, Any]) -> Callable[[], tuple[Generate, int]]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job["threads"])
    if job["tool"] == "bitsandbytes-without-bf16":
        import bitsandbytes.nn.modules

        bitsandbytes.nn.modules.has_avx512bf16 = lambda: False  # each layer calls it when it is created

    def load() -> tuple[Generate, int]:
        # transformers does not run a quantized folder in another type than the one it is stored in.
        dtype = getattr(torch, job["dtype"]) if job["tool"] == "transformers" else "auto"
        model = AutoModelForCausalLM.from_pretrained(job["source"], dtype=dtype, device_map=job.get("device", "cpu"))
        model.train(False)
        return _greedy(model, logits_to_keep=1), model.config.vocab_size

    return load


def _openvino(job: dict[str, Any]) -> Callable[[], tuple[Generate, int]]:
    from optimum.intel import OVModelForCausalLM

    def load() -> tuple[Generate, int]:
        config = {"INFERENCE_NUM_THREADS": str(job["threads"]), "PERFORMANCE_HINT": "LATENCY"}
        model = OVModelForCausalLM.from_pretrained(job["source"], ov_config=config)
        return _greedy(model), model.config.vocab_size

    return load


def _greedy(model: Any, **options: Any) -> Generate:
    """The plain loop over a model with transformers' interface; transformers' own `generate` is slower."""
    import torch

    name = cache_name(model)

    @torch.inference_mode()
    def generate(ids: Any, new: int) -> Iterator[None]:
        past, length = None, ids.shape[1]
        for _ in range(new):
            mask = torch.ones(len(ids), length, dtype=torch.int64, device=ids.device)
            out = model(input_ids=ids, attention_mask=mask, use_cache=True, **{name: past}, **options)
            ids, past, length = out.logits[:, -1].argmax(-1)[:, None], getattr(out, name), length + 1
            yield None

    return generate


def cache_name(model: Any) -> str:
    """What a model with transformers' interface calls its cache: versions from 5.24 on warn of the older name."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # importable, but not installed as a distribution
        return "unknown"


def _peak_rss_bytes() -> int:
    """This process's peak memory, from /proc where there is one: getrusage counts the parent process as well."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if line is not None:
            return int(line.split()[1]) * 1024
    import resource  # which Windows has not

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
