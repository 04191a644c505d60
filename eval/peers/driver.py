"""What the drivers of other tools share: their command line, the same calibration rows, and an ordinary checkpoint.

A driver runs in its tool's own environment, which has neither neoquant nor its requirements; only torch and
safetensors are imported here. It is called as

    python DRIVER.py MODEL ROWS.pt OUT --bits 4 --group-size 64 [--symmetric] [its own options]

and makes the folder OUT: the model with every quantized weight replaced by its *dequantized* value in float32, so that
one evaluator scores all tools alike, and peer.json: what was asked, versions, seconds, peak memory.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LINEARS = ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj", "attn.attention.out_proj")
LINEARS += ("mlp.c_fc", "mlp.c_proj")
RECORD = "peer.json"


def parser(description: str | None) -> argparse.ArgumentParser:
    """The command line that all drivers have in common."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", type=Path, help="a folder with a GPT-Neo in one model.safetensors")
    made.add_argument("rows", type=Path, help="torch.save of token ids, int64[rows, length]")
    made.add_argument("out", type=Path, help="the folder to make")
    made.add_argument("--bits", type=int, required=True)
    made.add_argument("--group-size", type=int, required=True)
    made.add_argument("--symmetric", action="store_true")
    return made


def calibration_rows(path: Path) -> torch.Tensor:
    """int64[rows, length], as written by torch.save."""
    rows = torch.load(path, weights_only=True)
    if rows.dtype != torch.int64 or rows.dim() != 2:
        raise SystemExit(f"{path} holds {rows.dtype} {list(rows.shape)}, not int64[rows, length]")
    return rows


class Meter:
    """Seconds of the work that it is wrapped around, and the most memory held until its end."""

    seconds = 0.0
    peak_rss_mb = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds = time.perf_counter() - started
        self.peak_rss_mb = peak_rss_mb()


def write_dense(
    args: argparse.Namespace, weights: Mapping[str, torch.Tensor], work: Meter, packages: tuple[str, ...]
) -> None:
    """Write args.out: the source's tensors in float32 with `weights` (by module name, [O, I]) in place of its own.

    Exits unless exactly the linears of all blocks were quantized, and each group holds no more values than the bits.
    """
    tensors = {name: tensor.float() for name, tensor in load_file(args.model / "model.safetensors").items()}
    layers = json.loads((args.model / "config.json").read_text())["num_layers"]
    expected = {f"transformer.h.{layer}.{name}" for layer in range(layers) for name in LINEARS}
    if weights.keys() != expected:
        raise SystemExit(f"quantized were {len(weights)} layers, expected {len(expected)}: {sorted(weights)[:3]}, ...")
    for name, weight in weights.items():
        stored = tensors[f"{name}.weight"]
        if stored.shape != weight.shape:
            raise SystemExit(f"{name} is {list(stored.shape)}, got {list(weight.shape)}")
        tensors[f"{name}.weight"] = weight.detach().float().cpu().contiguous()
    args.out.mkdir(parents=True)
    save_file(tensors, args.out / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (args.model / name).exists():
            shutil.copy(args.model / name, args.out)
    record: dict[str, Any] = {
        "asked": {key: str(value) for key, value in vars(args).items() if key not in ("model", "rows", "out")},
        "work_s": round(work.seconds, 2),
        "peak_rss_mb": round(work.peak_rss_mb, 1),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", *packages)},
    }
    (args.out / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def most_values(weight: torch.Tensor, group_size: int) -> int:
    """The largest number of different values in a group of weight[O, I], whose groups are in their natural order."""
    grouped = weight.reshape(weight.shape[0], -1, group_size).sort(-1).values
    return int((grouped.diff(dim=-1) > 0).sum(-1).max()) + 1


def peak_rss_mb() -> float:
    """The most memory this process has held."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in status.splitlines() if line.startswith("VmHWM:"))
