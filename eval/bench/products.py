"""Single products with quantized weights, beside torch's with float32 ones (and bitsandbytes' with NF4).

    OMP_NUM_THREADS=2 python eval/bench/products.py          # about three minutes; 3 GB of memory
    OMP_NUM_THREADS=2 python eval/bench/products.py --shape 125m --rows 1 --grids nf4 affine4

The weights are the linear layers of GPT-Neo's blocks, so many different blocks that together they lie well beyond the
processor's cache, and every product takes the next one. For each number of rows of activations, every contestant goes
through all layers in turn, `--repeats` times, and medians are told: milliseconds for a block, how many times as fast
as float32 that is, billions of multiplications and additions a second, and the gigabytes of weights read a second, as
a share of what a plain sum over memory reads on as many threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neoquant import native
from neoquant.grids import Grid, load_bitsandbytes, make_grid
from neoquant.nn.linear import QuantLinear
from neoquant.quantizers import Nearest

sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import ROOT, provenance

SHAPES = {"125m": 768, "1.3b": 2048}
GRIDS: dict[str, Grid] = {
    "nf4": make_grid(4, "nf4"),
    "int8": make_grid(8, "int8"),
    "affine2": make_grid(2, "affine", group_size=64),
    "affine3": make_grid(3, "affine", group_size=64),
    "affine4": make_grid(4, "affine", group_size=64),
    "affine8": make_grid(8, "affine", group_size=128),
}
BEYOND_CACHE = 160e6  # bytes of the smallest weights that are gone through
Product = Callable[[Tensor], Tensor]
Blocks = list[list[Product]]  # of each block, the products of its layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--grids", choices=GRIDS, nargs="+", default=list(GRIDS))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 128, 1024])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=ROOT / "eval" / "results" / "products.json")
    args = parser.parse_args()
    bandwidth = memory_bandwidth()
    print(f"{torch.get_num_threads()} threads read {bandwidth / 1e9:.1f} GB/s; {native.active().reason}", flush=True)
    found = {shape: bench(SHAPES[shape], args, bandwidth) for shape in args.shape}
    result = {
        "what": "products with the linear layers of GPT-Neo blocks, weights beyond the processor's cache",
        "provenance": {**provenance(("neoquant", "torch")), "native": native.active().reason},
        "repeats": args.repeats,
        "read_gb_per_s": round(bandwidth / 1e9, 2),
        "shapes": found,
    }
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {args.json}")


@torch.inference_mode()
def bench(hidden: int, args: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    """{rows: {contestant: figures}} for blocks of one width."""
    layers = [(hidden, hidden)] * 4 + [(4 * hidden, hidden), (hidden, 4 * hidden)]
    weights = sum(rows * columns for rows, columns in layers)
    count = max(2, int(BEYOND_CACHE // (weights / 4)))
    contestants: dict[str, tuple[Blocks, float]] = {}  # and the bytes of a block
    plain = [torch.randn(shape).mul_(0.02) for shape in layers]
    several = max(2, int(BEYOND_CACHE // (weights * 4)))
    held = [[w.clone() for w in plain] for _ in range(several)]
    contestants["float32"] = [[lambda x, w=w: torch.mm(x, w.T) for w in block] for block in held], weights * 4.0
    for name in args.grids:
        q = [Nearest().quantize(w, GRIDS[name]) for w in plain]
        blocks = [[QuantLinear(one) for one in q] for _ in range(count)]
        for block in blocks:
            for layer in block:
                layer.load_state_dict({key: value.clone() for key, value in layer.state_dict().items()}, assign=True)
        size = sum(tensor.nbytes for layer in blocks[0] for tensor in layer.state_dict().values())
        contestants[name] = [[layer.forward for layer in block] for block in blocks], float(size)
        rounded = [[QuantLinear(one) for one in q] for _ in range(2)]
        for layer in (layer for block in rounded for layer in block):
            layer.set_activations("int8")
        contestants[f"{name}, int8 activations"] = (
            [[layer.forward for layer in block] for block in rounded],
            float(size),
        )
    if "nf4" in args.grids:
        contestants["bitsandbytes nf4"] = bitsandbytes_blocks(plain), weights * 0.53
    found: dict[str, Any] = {}
    for rows in args.rows:
        times = {name: [] for name in contestants}  # type: dict[str, list[float]]
        inputs = {columns: torch.randn(rows, columns) for _, columns in layers}
        for repeat in range(args.repeats + 1):
            for name, (blocks, _) in contestants.items():
                few = blocks if rows < 64 else blocks[:1]
                started = time.perf_counter()
                for block in few:
                    for product, (_, columns) in zip(block, layers, strict=True):
                        product(inputs[columns])
                if repeat:  # the first warms up
                    times[name].append((time.perf_counter() - started) / len(few))
        found[str(rows)] = {
            name: figures(
                times[name], statistics.median(times["float32"]), contestants[name][1], rows * weights, bandwidth
            )
            for name in contestants
        }
        for name, figure in found[str(rows)].items():
            print(f"{hidden} {rows:5} rows {name:24} {json.dumps(figure)}", flush=True)
    return found


def figures(times: list[float], base: float, size: float, products: int, bandwidth: float) -> dict[str, float]:
    median = statistics.median(times)
    return {
        "ms": round(median * 1e3, 3),
        "fastest_ms": round(min(times) * 1e3, 3),
        "times_float32": round(base / median, 2),
        "gflops": round(2 * products / median / 1e9, 1),
        "gb_per_s": round(size / median / 1e9, 2),
        "of_bandwidth": round(size / median / bandwidth, 3),
    }


def bitsandbytes_blocks(plain: list[Tensor]) -> Blocks:
    """bitsandbytes' own products with NF4, as its layers call them."""
    bnb = load_bitsandbytes()

    def product(w: Tensor) -> Product:
        packed, state = bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
        return lambda x: bnb.matmul_4bit(x, packed.t(), quant_state=state)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [[product(w) for w in plain]] * 2


def memory_bandwidth() -> float:
    """Bytes a second that all threads read from 400 MB of memory."""
    memory = torch.ones(100_000_000)
    times = []
    for _ in range(9):
        started = time.perf_counter()
        memory.sum()
        times.append(time.perf_counter() - started)
    return memory.nbytes / min(times)


if __name__ == "__main__":
    main()
