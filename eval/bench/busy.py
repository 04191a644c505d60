"""Working beside programs that keep the cores busy: tokens a second, what of the speed alone is left, and CPU time.

    python eval/bench/busy.py                                   # the bundled model decodes; transformers in float32
    python eval/bench/busy.py --task evaluate
    python eval/bench/busy.py --shape 125m --before OTHER/CHECKOUT

Loops that do nothing else are pinned to cores: none, one on one core, one on each. Every way runs in a process of its
own, which loads first and then works for `--seconds` when it is its turn: neoquant (NF4) on threads of its own, on
those of torch (NEOQUANT_TEAM=openmp) and on one; evaluating, where torch takes part, also with GOMP_SPINCOUNT=10000, as
the commands set it; with `--before`, neoquant as it is in another checkout; and transformers. The order rotates. Ratios
are of the same turn, figures are medians of the turns. CPU time is the process's own, in milliseconds a token. A second
call adds its turns to those that are there, if nothing has changed.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from quantize_1p3b import SHAPES, make_source

sys.path.insert(0, os.environ.get("NEOQUANT_CHECKOUT", str(Path(__file__).parents[2])))
sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import ROOT, provenance

BURST = 8  # tokens decoded between two looks at the clock
ROWS = 2  # sequences evaluated between them
Turns = dict[str, dict[str, list[float]]]
"""By way and load."""


class Way(NamedTuple):
    """How a process computes: the program, the folder, and its environment."""

    tool: str
    folder: Path
    threads: int
    environment: dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["demo", *SHAPES], default="demo", help="demo: the bundled model")
    parser.add_argument("--task", choices=["decode", "evaluate"], default="decode")
    parser.add_argument("--before", type=Path, help="another checkout of neoquant, its library built")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--temp", type=Path, help="where the models are written, and deleted afterwards")
    parser.add_argument("--json", type=Path, help="default: eval/results/busy-SHAPE-TASK.json")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        tool, folder, task = args.child
        serve(tool, folder, task, args.threads, args.seconds)
        return
    target = args.json or ROOT / "eval" / "results" / f"busy-{args.shape}-{args.task}.json"
    with tempfile.TemporaryDirectory(prefix="neoquant-bench-", dir=args.temp) as temp:
        result = bench(args, Path(temp), target)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {target}")


def bench(args: argparse.Namespace, temp: Path, target: Path) -> dict[str, Any]:
    """All ways under all loads, in turn."""
    ways = prepare(args, temp)
    cores = sorted(os.sched_getaffinity(0))
    loads = {"alone": [], f"a loop on one of {len(cores)} cores": cores[:1], "a loop on each core": cores}
    made = provenance(("neoquant", "torch", "transformers"))
    rates, cpu = earlier(target, made, ways, list(loads))
    with running(ways, args.task, args.seconds) as children:
        for turn in range(args.turns):
            for load, taken in loads.items():
                with busy(taken):
                    for way in rotated(list(ways), turn):
                        found = ask(children[way])
                        rates[way][load].append(found["tokens_per_s"])
                        cpu[way][load].append(found["cpu_ms_a_token"])
    result = {
        "what": f"{args.task} beside busy loops, {args.shape}", "provenance": made, "threads": args.threads,
        "tokens_per_s": rates, "cpu_ms_a_token": cpu,
        "median": medians(rates), "of_the_speed_alone": medians(to_alone(rates)),
        "median_cpu": medians(cpu), "of_the_cpu_time_alone": medians(to_alone(cpu)),
        "of_the_other_checkout": medians(to_way(rates, "neoquant", "neoquant, before")) if args.before else None,
    }  # fmt: skip
    print(json.dumps({name: result[name] for name in list(result)[5:]}, indent=1))
    return result


def prepare(args: argparse.Namespace, temp: Path) -> dict[str, Way]:
    """The models, written, and the ways to run them."""
    from neoquant.quantization.quantize import quantize
    from neoquant.quantization.recipe import Recipe

    source = ROOT / "neoquant" / "demo" / "neoquant-demo"
    if args.shape != "demo":
        source = temp / "plain"
        make_source(args.shape, source)
    folder = quantize(source, temp / "nf4", Recipe.simple(4, "nf4")).folder
    ways = {
        "neoquant": Way("neoquant", folder, args.threads, {}),
        "neoquant, on torch's threads": Way("neoquant", folder, args.threads, {"NEOQUANT_TEAM": "openmp"}),
        "neoquant, on one thread": Way("neoquant", folder, 1, {}),
        "transformers, float32": Way("transformers", source, args.threads, {}),
    }
    if args.task == "evaluate":
        ways["neoquant, GOMP_SPINCOUNT=10000"] = Way("neoquant", folder, args.threads, {"GOMP_SPINCOUNT": "10000"})
    if args.before:
        if not (args.before / "neoquant").is_dir():
            raise SystemExit(f"--before: {args.before} is no checkout of neoquant")
        ways["neoquant, before"] = Way(
            "neoquant", folder, args.threads, {"NEOQUANT_CHECKOUT": str(args.before.resolve())}
        )
    return ways


def earlier(target: Path, made: dict[str, Any], ways: dict[str, Way], loads: list[str]) -> tuple[Turns, Turns]:
    """Rates and CPU times of earlier turns, where the same was measured on the same machine; else none yet."""
    if target.exists():
        before = json.loads(target.read_text("utf-8"))
        same = all(before["provenance"][name] == made[name] for name in ("commit", "cpu", "cores", "versions"))
        if same and list(before["tokens_per_s"]) == list(ways):
            return before["tokens_per_s"], before["cpu_ms_a_token"]
    return tuple({way: {load: [] for load in loads} for way in ways} for _ in range(2))  # type: ignore[return-value]


def rotated(ways: list[str], turn: int) -> list[str]:
    first = turn % len(ways)
    return ways[first:] + ways[:first]


def medians(turns: Turns) -> dict[str, dict[str, float]]:
    return {way: {load: round(statistics.median(of), 3) for load, of in by.items()} for way, by in turns.items()}


def to_alone(turns: Turns) -> Turns:
    """Each turn as a part of the same turn alone."""
    return {
        way: {load: [a / b for a, b in zip(of, by["alone"], strict=True)] for load, of in by.items()}
        for way, by in turns.items()
    }


def to_way(turns: Turns, way: str, other: str) -> Turns:
    """Each turn of a way as a part of the same turn of another."""
    return {
        way: {load: [a / b for a, b in zip(turns[way][load], turns[other][load], strict=True)] for load in turns[way]}
    }


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


@contextmanager
def running(ways: dict[str, Way], task: str, seconds: float) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """A process for each way, which has loaded."""
    children: dict[str, subprocess.Popen[str]] = {}
    try:
        for name, way in ways.items():
            environment = {**os.environ, "OMP_NUM_THREADS": str(way.threads), **way.environment}
            environment["PYTHONPATH"] = environment.get("NEOQUANT_CHECKOUT", str(ROOT))
            command = [sys.executable, __file__, "--seconds", str(seconds), "--threads", str(way.threads)]
            command += ["--child", way.tool, str(way.folder), task]
            children[name] = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        for name, child in children.items():
            assert child.stdout is not None
            if child.stdout.readline() != "ready\n":
                raise SystemExit(f"{name} could not be loaded")
        yield children
    finally:
        for child in children.values():
            child.kill()
            child.wait()


def ask(child: subprocess.Popen[str]) -> dict[str, float]:
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write("go\n")
    child.stdin.flush()
    found: dict[str, float] = json.loads(child.stdout.readline())
    return found


def serve(tool: str, folder: str, task: str, threads: int, seconds: float) -> None:
    """Load, say so, and work for so long each time that a line comes in."""
    import torch

    torch.set_num_threads(threads)
    work = {"neoquant": neoquant, "transformers": transformers}[tool](folder, task)
    work()
    print("ready", flush=True)
    for _ in sys.stdin:
        tokens, cpu, started = 0, time.process_time(), time.perf_counter()
        while (spent := time.perf_counter() - started) < seconds:
            tokens += work()
        used = time.process_time() - cpu
        print(json.dumps({"tokens_per_s": tokens / spent, "cpu_ms_a_token": 1000 * used / tokens}), flush=True)


def neoquant(folder: str, task: str) -> Callable[[], int]:
    import torch

    from neoquant.generation.generate import generate
    from neoquant.loading.load import load_model
    from neoquant.loading.pretrained import GPTNeoForCausalLM

    model = load_model(folder, GPTNeoForCausalLM, device="cpu")

    def decode() -> int:
        generate(model, torch.arange(16)[None], max_new_tokens=BURST)
        return BURST

    return decode if task == "decode" else evaluation(model)


def transformers(folder: str, task: str) -> Callable[[], int]:
    import torch
    from transformers import AutoModelForCausalLM

    from neoquant.benchmark.worker import cache_name

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.train(False)
    name = cache_name(model)

    @torch.inference_mode()
    def decode() -> int:
        ids, past = torch.arange(16)[None], None
        for _ in range(BURST):
            out = model(ids, use_cache=True, logits_to_keep=1, **{name: past})
            ids, past = out.logits[:, -1].argmax(-1)[:, None], getattr(out, name)
        return BURST

    return decode if task == "decode" else evaluation(model)


def evaluation(model: Any) -> Callable[[], int]:
    """The losses of whole windows."""
    import torch

    ids = torch.randint(model.config.vocab_size, (ROWS, 512), generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def evaluate() -> int:
        logits = model(ids).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        return ids.numel()

    return evaluate


if __name__ == "__main__":
    main()
