"""Quantizing GPT-Neo to NF4 with double quantization, disk to disk: neoquant beside transformers + bitsandbytes.

    python eval/bench/quantize_1p3b.py                        # GPT-Neo 1.3B's shapes; 7 GB of disk while it runs
    python eval/bench/quantize_1p3b.py --shape 125m --repeats 3

Random float16 weights of the model's exact shapes are written once. Then, `--repeats` times and in turn, each tool
quantizes them in a process of its own, and so does a plain copy of the file, for scale. Measured are the seconds from
the start of the process to its end (imports included), the seconds of the work behind the imports, and the peak of
resident memory. The source is in the page cache for all of them, and the disk has written what was left by the one
before. neoquant waits until the disk has its result, and so does the copy; transformers does not, and neoquant is also
run without waiting (`neoquant-unsynced`), to be compared with that. The tensors of both results are compared byte by
byte.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import ROOT, provenance

SHAPES = {"125m": (12, 768, 12), "1.3b": (24, 2048, 16)}  # layers, hidden, heads
TOOLS = ("neoquant", "neoquant-unsynced", "transformers", "copy")
PACKAGES = ("neoquant", "torch", "transformers", "bitsandbytes", "safetensors", "accelerate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.3b")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--temp", type=Path, help="where the models are written, and deleted afterwards")
    parser.add_argument("--json", type=Path, help="default: eval/results/quantize-SHAPE.json")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run_child(*args.child)))
        return
    target = args.json or ROOT / "eval" / "results" / f"quantize-{args.shape}.json"
    with tempfile.TemporaryDirectory(prefix="neoquant-bench-", dir=args.temp) as temp:
        result = bench(args.shape, args.repeats, Path(temp))
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {target}")


def bench(shape: str, repeats: int, temp: Path) -> dict[str, Any]:
    """Make the source, measure every tool in turn, check that the results are the same."""
    print(f"making a {shape}-shaped checkpoint ...", flush=True)
    source = temp / "source"
    child("make", shape, source)
    runs: dict[str, list[dict[str, float]]] = {tool: [] for tool in TOOLS}
    same = True
    for repeat in range(repeats):
        # The order alternates, so that no tool always runs behind the same neighbour.
        for tool in TOOLS if repeat % 2 == 0 else TOOLS[::-1]:
            os.sync()  # what the one before left to be written would be this one's to wait for
            runs[tool].append(child(tool, source, temp / tool))
            print(f"{repeat + 1}/{repeats} {tool:17}", describe(runs[tool][-1]), flush=True)
        if repeat == 0:
            same = child("same", temp / "neoquant", temp / "transformers")["same"]
            print("the same tensors, byte by byte" if same else "THE RESULTS DIFFER", flush=True)
        for tool in TOOLS:
            shutil.rmtree(temp / tool)
    median = {tool: {key: statistics.median(run[key] for run in runs[tool]) for key in runs[tool][0]} for tool in TOOLS}
    ratios, unsynced = (
        {key: round(theirs / median[tool][key], 3) for key, theirs in median["transformers"].items()}
        for tool in TOOLS[:2]
    )
    for tool in TOOLS:
        print(f"median {tool:17}", describe(median[tool]))
    print(f"neoquant is {ratios['wall_s']:.2f} times as fast and takes {1 / ratios['peak_rss_mb']:.3f} of the memory")
    return {
        "what": f"GPT-Neo {shape} shapes, random float16 weights, to NF4 with double quantization, disk to disk",
        "provenance": provenance(PACKAGES),
        "source_mb": round(sum(path.stat().st_size for path in source.iterdir()) / 1e6, 1),
        "same_tensors": same,
        "runs": runs,
        "median": median,
        "transformers_over_neoquant": ratios,
        "transformers_over_neoquant_unsynced": unsynced,
        "neoquant_over_copy_work_s": round(median["neoquant"]["work_s"] / median["copy"]["work_s"], 2),
    }


def child(*arguments: object) -> dict[str, Any]:
    """Run one step in a fresh process; add the seconds of the whole process to what it reports."""
    command = [sys.executable, str(Path(__file__)), "--child", *map(str, arguments)]
    started = time.perf_counter()
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, arguments))} failed:\n{done.stderr}")
    wall = time.perf_counter() - started
    return {"wall_s": round(wall, 3), **json.loads(done.stdout.splitlines()[-1])}


def child_environment() -> dict[str, str]:
    """This process's environment, with this checkout to import and no hub to ask."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def run_child(step: str, *arguments: str) -> dict[str, Any]:
    """What a process of its own does: make the source, run a tool, or compare two results."""
    if step == "make":
        make_source(arguments[0], Path(arguments[1]))
        return {}
    if step == "same":
        return {"same": same_tensors(Path(arguments[0]), Path(arguments[1]))}
    tools: dict[str, Callable[[], Callable[[str, str], object]]] = {
        "neoquant": neoquant_tool,
        "neoquant-unsynced": unsynced_tool,
        "transformers": transformers_tool,
        "copy": lambda: copy,
    }
    work_s = timed(tools[step](), *arguments)
    return {"work_s": round(work_s, 3), "peak_rss_mb": round(peak_rss_mb(), 1)}


def timed(tool: Callable[[str, str], object], source: str, out: str) -> float:
    started = time.perf_counter()
    tool(source, out)
    return time.perf_counter() - started


def neoquant_tool() -> Callable[[str, str], object]:
    from neoquant.quantization.quantize import quantize
    from neoquant.quantization.recipe import Recipe

    recipe = Recipe.load("nf4")
    return lambda source, out: quantize(source, out, recipe)


def unsynced_tool() -> Callable[[str, str], object]:
    os.fsync = lambda descriptor: None
    return neoquant_tool()


def transformers_tool() -> Callable[[str, str], object]:
    import bitsandbytes  # noqa: F401 (transformers would import it while it works)
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    asked = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16,
    )

    def run(source: str, out: str) -> None:
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=asked, device_map="cpu", dtype="auto")
        model.save_pretrained(out)

    return run


def copy(source: str, out: str) -> None:
    shutil.copytree(source, out)
    with (Path(out) / "model.safetensors").open("rb") as file:
        os.fsync(file.fileno())


VOCABULARY = 50257


def make_source(shape: str, folder: Path, some_layers: int | None = None) -> None:
    """Write random weights of the shapes, one tensor in memory at a time; of some layers only, with as much less of the
    vocabulary, so that each part of the network keeps its share."""
    import torch

    from neoquant.checkpoint import CheckpointWriter

    all_layers, hidden, heads = SHAPES[shape]
    layers = some_layers or all_layers
    vocabulary = VOCABULARY * layers // all_layers
    sizes = {"wte": (vocabulary, hidden), "wpe": (2048, hidden), "ln_f": (hidden,)}
    for layer in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            sizes[f"h.{layer}.attn.attention.{name}"] = (hidden, hidden)
        sizes |= {f"h.{layer}.mlp.c_fc": (4 * hidden, hidden), f"h.{layer}.mlp.c_proj": (hidden, 4 * hidden)}
        sizes |= {f"h.{layer}.{norm}": (hidden,) for norm in ("ln_1", "ln_2")}
    random = torch.Generator().manual_seed(0)
    config = {
        "model_type": "gpt_neo",
        "architectures": ["GPTNeoForCausalLM"],
        "attention_types": [[["global", "local"], layers // 2]],
        "num_layers": layers,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_heads": heads,
        "dtype": "float16",
    }
    with CheckpointWriter(folder, tensors=2 * len(sizes), shard_size=10**11) as sink:
        for name, size in sizes.items():
            weight = torch.randn(size, generator=random).mul_(0.02)
            sink.put(f"transformer.{name}.weight", (1 + weight if len(size) == 1 else weight).half())
            if name.endswith(("out_proj", "c_fc", "c_proj")) or len(size) == 1:
                sink.put(f"transformer.{name}.bias", torch.zeros(size[0], dtype=torch.float16))
        sink.finish(config, files={})


def same_tensors(ours: Path, theirs: Path) -> bool:
    """Whether two folders hold the same tensors under the same names; JSON in tensors is compared as JSON."""
    import torch
    from safetensors import safe_open

    with (
        safe_open(ours / "model.safetensors", "pt") as a,
        safe_open(theirs / "model.safetensors", "pt") as b,
    ):
        if set(a.keys()) != set(b.keys()):
            return False
        for name in a.keys():  # noqa: SIM118 (not a dict)
            left, right = a.get_tensor(name), b.get_tensor(name)
            if ".quant_state." in name:
                if json.loads(bytes(left.tolist())) != json.loads(bytes(right.tolist())):
                    return False
            elif left.dtype != right.dtype or not torch.equal(left, right):
                return False
    return True


def peak_rss_mb() -> float:
    """The most this process has held; getrusage would count the parent it was forked from."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in status.splitlines() if line.startswith("VmHWM:"))


def describe(run: dict[str, float]) -> str:
    return f"{run['wall_s']:7.2f} s ({run['work_s']:.2f} s of work), {run['peak_rss_mb']:,.0f} MB"


if __name__ == "__main__":
    main()
