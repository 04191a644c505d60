"""What `neoquant tune` takes on GPT-Neo's shapes: processor seconds of a step, and memory.

    python eval/bench/tune_125m.py                   # 125M, 3 bits in groups of 64, 5 rows of 512 tokens, 2 steps

Random float16 weights of the model's exact shapes are written once and rounded to nearest; what is measured does not
depend on their values. A step takes 2,048 tokens, whatever the rows' length. Memory is that of the whole process:
beside both models, what is predicted from each row is held, 4 bytes a token and hidden unit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantize_1p3b import SHAPES, VOCABULARY, make_source

sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import ROOT, provenance

from neoquant.progress import Progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="125m")
    parser.add_argument("--rows", type=int, default=5)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", type=Path, help="default: eval/results/tune-SHAPE.json")
    parser.add_argument("--child", nargs=2, metavar=("SOURCE", "QUANTIZED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args, *map(Path, args.child))))
        return
    import neoquant

    with tempfile.TemporaryDirectory(prefix="neoquant-bench-") as temp:
        source, quantized = Path(temp) / "source", Path(temp) / "quantized"
        make_source(args.shape, source)
        neoquant.quantize(source, quantized, neoquant.Recipe.simple(3, "affine", group_size=64))
        words = [f"--{name}={getattr(args, name)}" for name in ("shape", "rows", "length", "steps")]
        command = [sys.executable, __file__, *words, "--child", str(source), str(quantized)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = {
        "what": f"neoquant tune on GPT-Neo {args.shape} shapes, random weights, 3 bits in groups of 64",
        **{name: getattr(args, name) for name in ("rows", "length", "steps")},
        "provenance": provenance(("neoquant", "torch")),
        **json.loads(done.stdout.splitlines()[-1]),
    }
    target = args.json or ROOT / "eval" / "results" / f"tune-{args.shape}.json"
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{result['step_processor_s']} s a step, {result['peak_rss_mb']:,} MB; written to {target}")


class Stopwatch(Progress):
    """Processor seconds at each step's end."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def task(self, label: str, total: float | None) -> Iterator[Callable[[float], None]]:
        times = self.seconds[label] = [time.process_time()]
        yield lambda amount: times.append(time.process_time())


def measure(args: argparse.Namespace, source: Path, quantized: Path) -> dict[str, Any]:
    """One run in this process."""
    import torch

    from neoquant.calibration.dataset import Calibration
    from neoquant.tuning.tune import tune

    ids = torch.randint(0, VOCABULARY, (args.rows, args.length), generator=torch.Generator().manual_seed(0))
    watch = Stopwatch()
    out = quantized.with_name("tuned")
    made = tune(
        quantized, out, base=source, calibration=Calibration(ids, "dice", "", 0), steps=args.steps, progress=watch
    )
    steps, originals = watch.seconds["tuning"], watch.seconds["original"]
    return {
        "trained": dict(made.trained),
        "step_processor_s": round((steps[-1] - steps[0]) / args.steps, 1),
        "original_row_processor_s": round((originals[-1] - originals[0]) / args.rows, 2),
        "threads": torch.get_num_threads(),
        "peak_rss_mb": round(made.peak_rss_bytes / 1e6),
    }


if __name__ == "__main__":
    main()
