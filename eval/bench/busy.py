"""Generating beside programs that keep the cores busy: tokens a second, and what of the speed alone is left.

    python eval/bench/busy.py                               # the bundled model in NF4, and transformers in float32

Loops that do nothing else are pinned to cores: none, one on one core, one on each. Every way runs in a process of its
own, which loads first and then decodes greedily for `--seconds` when it is its turn: neoquant on all threads, on one,
and with GOMP_SPINCOUNT=10000 (how long OpenMP's threads stay awake), and transformers. The order alternates; figures
are medians of `--repeats` turns. CPU time is the process's own, in milliseconds a token.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import ROOT, provenance

SPIN = {"GOMP_SPINCOUNT": "10000"}
BURST = 8  # tokens between two looks at the clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a plain folder; default: the bundled model")
    parser.add_argument("--name", default="demo", help="of the result")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="default: eval/results/busy-NAME.json")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        serve(args.child[0], args.child[1], int(args.child[2]), args.seconds)
        return
    target = args.json or ROOT / "eval" / "results" / f"busy-{args.name}.json"
    with tempfile.TemporaryDirectory(prefix="neoquant-bench-") as temp:
        result = bench(args, Path(temp))
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {target}")


def bench(args: argparse.Namespace, temp: Path) -> dict[str, Any]:
    """All ways under all loads, in turn."""
    from neoquant.quantization.quantize import quantize
    from neoquant.quantization.recipe import Recipe

    source = args.model or ROOT / "neoquant" / "demo" / "neoquant-demo"
    folder = quantize(source, temp / "nf4", Recipe.simple(4, "nf4")).folder
    ways: dict[str, tuple[str, Path, int, dict[str, str]]] = {
        "neoquant": ("neoquant", folder, args.threads, {}),
        "neoquant, one thread": ("neoquant", folder, 1, {}),
        "neoquant, GOMP_SPINCOUNT=10000": ("neoquant", folder, args.threads, SPIN),
        "transformers, float32": ("transformers", source, args.threads, {}),
    }
    cores = sorted(os.sched_getaffinity(0))
    loads = {"alone": [], "one loop": cores[:1], "one loop a core": cores}
    children = {way: start(*how, args.seconds) for way, how in ways.items()}
    rates: dict[str, dict[str, list[float]]] = {way: {load: [] for load in loads} for way in ways}
    cpu: dict[str, dict[str, list[float]]] = {way: {load: [] for load in loads} for way in ways}
    try:
        for child in children.values():
            child.stdout.readline()  # it has loaded
        for repeat in range(args.repeats):
            for load, taken in loads.items():
                with busy(taken):
                    for way in list(children) if repeat % 2 == 0 else list(children)[::-1]:
                        found = ask(children[way])
                        rates[way][load].append(found["tokens_per_s"])
                        cpu[way][load].append(found["cpu_ms_a_token"])
    finally:
        for child in children.values():
            child.kill()
            child.wait()
    median = {
        way: {load: round(statistics.median(of), 1) for load, of in found.items()} for way, found in rates.items()
    }
    milliseconds = {
        way: {load: round(statistics.median(of), 3) for load, of in found.items()} for way, found in cpu.items()
    }
    kept = {way: {load: round(of / found["alone"], 3) for load, of in found.items()} for way, found in median.items()}
    print(json.dumps({"median": median, "of the speed alone": kept, "cpu_ms_a_token": milliseconds}, indent=1))
    return {
        "what": f"generating beside busy loops, {args.name}",
        "provenance": provenance(("neoquant", "torch", "transformers")), "threads": args.threads,
        "tokens_per_s": rates, "median": median, "of_the_speed_alone": kept, "cpu_ms_a_token": milliseconds,
    }  # fmt: skip


@contextmanager
def busy(cores: list[int]) -> Iterator[None]:
    """A loop on each of these cores."""
    code = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
    loops = [subprocess.Popen([sys.executable, "-c", code, str(core)]) for core in cores]
    try:
        time.sleep(0.3 if loops else 0)
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def start(tool: str, folder: Path, threads: int, extra: dict[str, str], seconds: float) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), **extra}
    command = [sys.executable, __file__, "--seconds", str(seconds), "--child", tool, str(folder), str(threads)]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(child: subprocess.Popen[str]) -> dict[str, float]:
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write("go\n")
    child.stdin.flush()
    found: dict[str, float] = json.loads(child.stdout.readline())
    return found


def serve(tool: str, folder: str, threads: int, seconds: float) -> None:
    """Load, say so, and decode for so long each time that a line comes in."""
    import torch

    torch.set_num_threads(threads)
    step = neoquant(folder) if tool == "neoquant" else transformers(folder)
    step()
    print("ready", flush=True)
    for _ in sys.stdin:
        tokens, cpu, started = 0, time.process_time(), time.perf_counter()
        while (spent := time.perf_counter() - started) < seconds:
            step()
            tokens += BURST
        used = time.process_time() - cpu
        print(json.dumps({"tokens_per_s": tokens / spent, "cpu_ms_a_token": 1000 * used / tokens}), flush=True)


def neoquant(folder: str) -> Any:
    import torch

    from neoquant.generation.generate import generate
    from neoquant.loading.load import load_model
    from neoquant.loading.pretrained import GPTNeoForCausalLM

    model = load_model(folder, GPTNeoForCausalLM, device="cpu")
    return lambda: generate(model, torch.arange(16)[None], max_new_tokens=BURST)


def transformers(folder: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.train(False)

    @torch.inference_mode()
    def step() -> None:
        ids, past = torch.arange(16)[None], None
        for _ in range(BURST):
            out = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            ids, past = out.logits[:, -1].argmax(-1)[:, None], out.past_key_values

    return step


if __name__ == "__main__":
    main()
