"""neoquant on a GPU: its tests and kernels, and decoding, prompts, evaluation and calibration beside other programs.

    python eval/bench/gpu.py                                   # 1.3b, within ten minutes
    python eval/bench/gpu.py --shapes 125m 1.3b 2.7b --parts kernels decode
    python eval/bench/gpu.py --device cpu --shapes tiny --parts columns decode prefill evaluate gptq    # does it run?

Needs no network. Weights are random, of the models' exact shapes. Every part is written to the result as soon as it is
measured, with the card's name; a part that fails is recorded with its error, and the others run. Contestants take
turns, `--repeats` times, or less often where a part has had its share of `--seconds`; figures are medians. The
bandwidth is that of copying on the card within this run. In the table of kernels every product takes another copy of
the weight, so many that they lie beyond the card's cache. `columns` times GPTQ's loop alone, one block of 128 columns.
`goals` says what the figures are to reach on an H100 or H200, and which did. transformers, with plain bfloat16 weights
and with bitsandbytes' NF4, runs the same folders, where it is installed.

A machine without network that has torch for CUDA, Triton, transformers and pytest lacks a few packages more, 13 MB as
wheels (of bitsandbytes, the library for the machine's CUDA alone). Where there is a network, for Python 3.12:

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_24_x86_64 \\
        --platform manylinux_2_17_x86_64 --dest wheels \\
        annotated-types bitsandbytes datasets dill multiprocess pydantic pydantic-core zstandard
    zip --delete wheels/bitsandbytes-*.whl '*cuda11*' '*cuda12*' '*cuda132*' '*rocm*' '*xpu*'

and there: pip install --no-index --no-deps wheels/*.whl
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
import traceback
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import cycle, product
from pathlib import Path
from typing import Any

import torch
from quantize_1p3b import PACKAGES, SHAPES, make_source
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
import gpu_goals
from clock import Clock
from provenance import ROOT, provenance

PARTS = ("tests", "kernels", "columns", "decode", "prefill", "evaluate", "gptq")
SHARES = {
    "tests": 4, "kernels": 3, "columns": 1, "models": 3, "decode": 5, "prefill": 1, "evaluate": 2, "gptq": 3,
}  # fmt: skip
SHAPES |= {"2.7b": (32, 2560, 20), "tiny": (2, 128, 2)}
RECIPES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "nf4": (4, "nf4", {}),
    "affine4": (4, "affine", {"group_size": 64}),
    "int8": (8, "int8", {}),
}
GRIDS = {**RECIPES, "affine3": (3, "affine", {"group_size": 64}), "mxfp4": (4, "mxfp4", {})}
CONTEXT, PROMPT, WINDOWS, WINDOW = 128, 2048, 32, 1024
ROWS = (1, 4, 16, 64, 512)
Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1.3b"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=540, help="about, in all; what has not begun by then does not")
    parser.add_argument("--temp", type=Path, help="where the models are written, and deleted afterwards")
    parser.add_argument("--json", type=Path, default=ROOT / "eval" / "results" / "gpu.json")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("NOT RUN: this machine has no CUDA device")
        return
    result: dict[str, Any] = {
        "what": "neoquant on a GPU, beside transformers", "provenance": provenance((*PACKAGES, "triton")),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", "repeats": args.repeats,
        "read_and_write_gb_per_s": round(bandwidth(device) / 1e9, 1), "parts": {},
    }  # fmt: skip

    clock = Clock(args.seconds, shares(args.shapes, args.parts))

    def record(name: str, part: Callable[[Clock], Any]) -> None:
        started = time.perf_counter()
        try:
            if clock.left() <= 0:
                raise TimeoutError(f"not begun: {clock.seconds:g} seconds were over")
            found = part(clock)
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
        result["parts"][name] = {"seconds": round(time.perf_counter() - started, 1), "found": found}
        result["goals"] = gpu_goals.reached(result)
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(found, indent=1), flush=True)

    if "tests" in args.parts:
        record("tests", lambda clock: run_tests(clock.begin("tests")))
    for shape in args.shapes:
        if "kernels" in args.parts:
            record(f"{shape} kernels", partial(kernels, shape, device, args.repeats))
        if "columns" in args.parts:
            record(f"{shape} columns", partial(columns, shape, device, args.repeats))
        with tempfile.TemporaryDirectory(prefix="neoquant-bench-", dir=args.temp) as temp:
            run_models(shape, Path(temp), device, args, record)
    print(gpu_goals.table(result["goals"]))
    print(f"written to {args.json}")


def shares(shapes: list[str], parts: list[str]) -> dict[str, float]:
    """What each part may take of the time, in their order."""
    models = {"models"} if {"decode", "prefill", "evaluate", "gptq"} & set(parts) else set()
    wanted = {part: share for part, share in SHARES.items() if part in {*parts, *models}}
    tests = {"tests": wanted.pop("tests")} if "tests" in wanted else {}
    return {**tests, **{f"{shape} {part}": share for shape in shapes for part, share in wanted.items()}}


def run_tests(limit: float) -> dict[str, Any]:
    """The tests marked `gpu`: pytest's last lines, also of what was stopped after so many seconds."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--continue-on-collection-errors"]
    if find_spec("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    command += ["tests/contract", "tests/unit"]  # of which some need packages that a bare machine may lack
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        try:
            code = subprocess.run(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, timeout=limit).returncode
            found: dict[str, Any] = {"code": code}
        except subprocess.TimeoutExpired:
            found = {"error": f"not done in {limit:.3g} seconds"}
        said.seek(0)
        return {**found, "last": said.read().strip().splitlines()[-12:]}


def kernels(shape: str, device: torch.device, repeats: int, clock: Clock) -> dict[str, Any]:
    """{weight: {rows: {grid kernel: microseconds, share of the bandwidth}}} of every kernel that runs there."""
    from neoquant.grids import make_grid
    from neoquant.kernels import KERNELS, ROUNDING
    from neoquant.quantizers import Nearest

    hidden, peak, found = SHAPES[shape][1], bandwidth(device), {}
    sizes = ((hidden, hidden), (4 * hidden, hidden), (hidden, 4 * hidden))
    within = Clock(clock.begin(f"{shape} kernels"), {f"{size} {rows}": 1 for size in sizes for rows in ROWS})
    for size in sizes:
        w = torch.randn(size, generator=torch.Generator().manual_seed(0)).mul_(0.02)
        contestants: dict[str, tuple[list[Callable[[Tensor], Tensor]], int]] = {}
        plain = copies({"w": w.to(device, torch.bfloat16)})
        contestants["bfloat16"] = [lambda x, s=s: torch.nn.functional.linear(x, s["w"]) for s in plain], 2 * w.numel()
        for name, (bits, kind, options) in GRIDS.items():
            grid = make_grid(bits, kind, **options)
            q = Nearest().quantize(w, grid).to(device)
            for kernel in (*KERNELS.values(), *ROUNDING.values()):
                if kernel.refuse(grid, size, device) is None:
                    states = copies(kernel.pack(q))
                    products = [partial(_product, kernel, s, grid, size) for s in states]
                    contestants[f"{name} {kernel.name}"] = products, sum(t.nbytes for t in states[0].values())
        found["x".join(map(str, size))] = {
            str(rows): _turns(contestants, rows, size, device, repeats, peak, within) for rows in ROWS
        }
    return found


def columns(shape: str, device: torch.device, repeats: int, clock: Clock) -> dict[str, Any]:
    """{grid: {rows: microseconds of a block of 128 columns}}, of rows on their own and of those of heads, coupled; and
    what rounds them."""
    from neoquant.grids import make_grid
    from neoquant.quantizers.feedback import BLOCK, round_columns, whole_block
    from neoquant.quantizers.hessian import OutputFactor

    clock.begin(f"{shape} columns")
    _, hidden, heads = SHAPES[shape]
    found: dict[str, Any] = {}
    upper, order = torch.eye(BLOCK, device=device), torch.arange(BLOCK, device=device)
    factor = OutputFactor.of(torch.eye(hidden // heads).expand(heads, -1, -1), 0.01).to(device)
    w = torch.randn(hidden, BLOCK, generator=torch.Generator().manual_seed(0)).to(device)
    for name, (bits, kind, options) in GRIDS.items():
        grid = make_grid(bits, kind, **options)
        on_grid = grid.columns(grid.fit(w), (hidden, BLOCK))
        in_one_call = whole_block(w, on_grid) is not None
        found[name] = {"rounded_by": "one call" if in_one_call else "a loop in torch"}
        for rows, coupled in (("alone", None), ("coupled", factor))[: 2 if in_one_call else 1]:  # it would take minutes
            step = partial(round_columns, w.T, upper, on_grid, order, None, coupled)
            took = timed({rows: lambda step=step: seconds(step, device, 1)}, repeats, clock)[rows]
            found[name][rows] = took if isinstance(took, dict) else round(took * 1e6, 1)
    return found


def _product(kernel: Any, state: dict[str, Tensor], grid: Any, size: tuple[int, int], x: Tensor) -> Tensor:
    y: Tensor = kernel.linear(x, state, grid, size, None)
    return y


def copies(state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """So many of a state that together they lie beyond a card's cache of 60 MB."""
    count = min(64, max(2, int(200e6 // sum(tensor.nbytes for tensor in state.values()))))
    return [{name: tensor.clone() for name, tensor in state.items()} for _ in range(count)]


def _turns(
    contestants: dict[str, tuple[list[Callable[[Tensor], Tensor]], int]],
    rows: int,
    size: tuple[int, int],
    device: torch.device,
    repeats: int,
    peak: float,
    clock: Clock,
) -> dict[str, Any]:
    clock.begin(f"{size} {rows}")
    on_gpu = device.type == "cuda"
    x = torch.randn(rows, size[1], device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    steps = {
        name: partial(_cold, products, x, device)
        for name, (products, _) in contestants.items()
        if on_gpu or name != "bfloat16"
    }
    return {
        name: took
        if isinstance(took, dict)
        else {"us": round(took * 1e6, 2), "of_bandwidth": round(contestants[name][1] / took / peak, 3)}
        for name, took in timed(steps, repeats, clock).items()
    }


def _cold(products: list[Callable[[Tensor], Tensor]], x: Tensor, device: torch.device) -> float:
    turn = cycle(products)
    return seconds(lambda: next(turn)(x), device, len(products))


def timed(steps: dict[str, Callable[[], float]], repeats: int, clock: Clock) -> dict[str, Any]:
    """The median of the seconds that each step says, in turn, the first of them not counted; or why there is none."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    failed: dict[str, dict[str, str]] = {}
    with torch.inference_mode():
        for repeat, name in product(range(repeats + 1), steps):
            if clock.is_over():
                break
            if name not in failed:
                try:
                    took = steps[name]()
                except Exception as error:
                    failed[name] = {"error": f"{type(error).__name__}: {error}"}
                    continue
                if repeat:
                    times[name].append(took)
    late = {"error": "not reached: its share of the time was over"}
    return {name: failed.get(name) or (statistics.median(t) if t else late) for name, t in times.items()}


def run_models(
    shape: str, temp: Path, device: torch.device, args: argparse.Namespace, record: Callable[..., None]
) -> None:
    """Make the folders, load every contestant, and let them take turns."""
    from neoquant.quantization.quantize import quantize
    from neoquant.quantization.recipe import Recipe

    wanted = [part for part in ("decode", "prefill", "evaluate") if part in args.parts]
    if not wanted and "gptq" not in args.parts:
        return
    models: dict[str, Any] = {}

    def prepare(clock: Clock) -> list[str]:
        clock.begin(f"{shape} models")
        make_source(shape, temp / "plain")
        if wanted:
            for name, (bits, kind, options) in RECIPES.items():
                quantize(temp / "plain", temp / name, Recipe.simple(bits, kind, **options))
            models.update(load_models(temp, device))
        return sorted(models)

    def measure(part: str, clock: Clock) -> dict[str, Any]:
        clock.begin(f"{shape} {part}")
        steps = {"decode": decode_steps, "prefill": prefill_steps, "evaluate": evaluate_steps}[part]
        return take_turns(steps(models, 50257, device, args.new_tokens), device, args.repeats, clock)

    record(f"{shape} models", prepare)
    if wanted:
        ours = {name: model for name, model in models.items() if "neoquant" in name}
        record(f"{shape} bytes a token", lambda clock: {name: read_by_a_token(model) for name, model in ours.items()})
        del ours
    for part in wanted:
        record(f"{shape} {part}", partial(measure, part))
    models.clear()
    if "gptq" in args.parts:
        record(f"{shape} gptq", lambda clock: gptq(temp, device))


def load_models(temp: Path, device: torch.device) -> dict[str, Any]:
    """neoquant's models and transformers', by name; what cannot be loaded is left out, and said."""
    from neoquant.loading.load import load_model
    from neoquant.loading.pretrained import GPTNeoForCausalLM

    models: dict[str, Any] = {}
    for name in ("plain", *RECIPES):
        models[f"neoquant {name}"] = load_model(temp / name, GPTNeoForCausalLM, device=device)
    for name in ("plain", "nf4"):
        try:
            from transformers import AutoModelForCausalLM

            options: dict[str, Any] = {"dtype": torch.bfloat16 if device.type == "cuda" else torch.float32}
            if name == "nf4":  # with tensor cores, as its users run it
                from transformers import BitsAndBytesConfig

                options["quantization_config"] = BitsAndBytesConfig(
                    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                    bnb_4bit_compute_dtype=options["dtype"],
                )  # fmt: skip
            models[f"transformers {name}"] = AutoModelForCausalLM.from_pretrained(
                temp / "plain", device_map=str(device), **options
            ).eval()
        except Exception as error:
            print(f"transformers {name} is left out: {type(error).__name__}: {error}", flush=True)
    return models


def read_by_a_token(model: Any) -> int:
    """Bytes of all weights, but of positions, of which a token reads one."""
    held = {id(t): (name, t.nbytes) for name, t in (*model.named_parameters(), *model.named_buffers())}
    return sum(size for name, size in held.values() if ".wpe." not in name)


def decode_steps(
    models: dict[str, Any], vocabulary: int, device: torch.device, new: int
) -> dict[str, tuple[Step, int]]:
    """Batches of 1 and 32, greedy, behind CONTEXT tokens, ours also by CUDA graphs: (what to time, tokens it makes)."""
    steps: dict[str, tuple[Step, int]] = {}
    for name, model in models.items():
        for batch in (1, 32):
            ids = torch.randint(0, vocabulary, (batch, CONTEXT), device=device)
            options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "eos_token_id": []}
            if name.startswith("transformers"):
                options |= {"min_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}
                options |= {"attention_mask": torch.ones_like(ids)}
            ways = {"": options}
            if name.startswith("neoquant") and device.type == "cuda":
                ways[", CUDA graph"] = options | {"cache_implementation": "static"}
            for way, asked in ways.items():
                steps[f"{name}, batch {batch}{way}"] = lambda m=model, i=ids, o=asked: m.generate(i, **o), batch * new
    return steps


def prefill_steps(
    models: dict[str, Any], vocabulary: int, device: torch.device, new: int
) -> dict[str, tuple[Step, int]]:
    """A prompt of PROMPT tokens, logits of the last alone."""
    ids = torch.randint(0, vocabulary, (1, PROMPT), device=device)
    return {name: (lambda m=model: m(ids, logits_to_keep=1).logits, PROMPT) for name, model in models.items()}


def evaluate_steps(
    models: dict[str, Any], vocabulary: int, device: torch.device, new: int
) -> dict[str, tuple[Step, int]]:
    """The mean negative log-likelihood of WINDOWS windows, four at a time; and, of ours, each token's, which comes
    to the host, as `neoquant eval` scores them."""
    from neoquant.evaluation.corpus import Window
    from neoquant.evaluation.scoring import batch_limits, batches, score_batches

    ids = torch.randint(0, vocabulary, (WINDOWS, WINDOW + 1), dtype=torch.int32)
    windows = [Window(number, row, WINDOW) for number, row in enumerate(ids)]
    limits = batch_limits(device)
    work = [[windows[number] for number in batch] for batch in batches(windows, limits.positions)]
    given = ids[:, :-1].long().to(device).split(4)

    def run(model: Any) -> list[Tensor]:
        return [model(some, labels=some).loss for some in given]

    def score(model: Any) -> float:
        return sum(float(s.nats.sum()) for (s,) in score_batches([model], work, limits.rows, lambda tokens: None))

    steps: dict[str, tuple[Step, int]] = {}
    for name, model in models.items():
        steps[name] = partial(run, model), WINDOWS * WINDOW
        if name.startswith("neoquant"):
            steps[f"{name}, scored"] = partial(score, model), WINDOWS * WINDOW
    return steps


def take_turns(steps: dict[str, tuple[Step, int]], device: torch.device, repeats: int, clock: Clock) -> dict[str, Any]:
    """Tokens a second, medians."""
    found = timed({name: partial(seconds, step, device, 1) for name, (step, _) in steps.items()}, repeats, clock)
    return {
        name: took if isinstance(took, dict) else {"tokens_per_s": round(steps[name][1] / took, 1)}
        for name, took in found.items()
    }


def gptq(temp: Path, device: torch.device) -> dict[str, Any]:
    """Seconds of GPTQ with 16 x 512 random tokens, on the device."""
    from neoquant.calibration.dataset import Calibration
    from neoquant.data.fingerprints import hash_texts
    from neoquant.quantization.quantize import quantize
    from neoquant.quantization.recipe import Recipe

    ids = torch.randint(0, 50257, (16, 512), generator=torch.Generator().manual_seed(0))
    recipe = Recipe.simple(4, "affine", group_size=64, quantizer="gptq")
    samples = Calibration(ids, "random", hash_texts(["random"]), 0)
    made = quantize(temp / "plain", temp / "gptq", recipe, calibration=samples, device=device)
    return {"seconds": round(made.seconds, 1), "rounding_seconds": round(sum(made.layer_seconds.values()), 1)}


def seconds(step: Step, device: torch.device, times: int) -> float:
    """Of one call, from when the device has nothing to do until it has nothing to do."""
    _wait(device)
    started = time.perf_counter()
    for _ in range(times):
        step()
    _wait(device)
    return (time.perf_counter() - started) / times


def bandwidth(device: torch.device) -> float:
    """Bytes a second that are read and written by a copy of a gigabyte."""
    source = torch.ones(1 << (28 if device.type == "cuda" else 24), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source), device, 5) for _ in range(5))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
