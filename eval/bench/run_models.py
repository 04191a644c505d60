"""Running GPT-Neo: decoding, reading a prompt, evaluating and peak memory, neoquant beside transformers and OpenVINO.

    python eval/bench/run_models.py --shape 125m --openvino-python ov/bin/python
    python eval/bench/run_models.py --shape 1.3b --new-tokens 16 --parts decode

Random float16 weights of the model's exact shapes are written once and quantized to NF4 as bitsandbytes stores it, and
in neoquant's own format, with an int8 embedding, to NF4 and to affine groups of 64 with 4 bits (and, where `--models`
asks for it, to a trellis of 2 or 3 bits: the first block's, which stands for all, since searching takes a second for a
million weights). transformers runs the
plain weights in float32 and the bitsandbytes folder, that also as on a CPU without bf16 instructions, which
bitsandbytes' fused product needs; OpenVINO runs the plain weights in int4 (asymmetric, groups of 64,
8-bit embedding), as optimum-intel exports them. All run in turn, each in a process of its own, `--repeats` times;
figures are medians. The bandwidth limit of decoding is what a sum over a large tensor reads a second, divided by the
bytes of weights that a token needs: all but the rows of the embeddings that are not looked up, the head's once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from quantize_1p3b import PACKAGES, SHAPES, child_environment, make_source

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import ROOT, provenance

PARTS = ("decode", "prefill", "evaluate")
CONTEXT = 1024
RECIPES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {  # arguments of Recipe.simple
    "nf4": ((4, "nf4"), {}),
    "nf4-int8-embedding": ((4, "nf4"), {"embeddings": "int8"}),
    "affine4-g64-int8-embedding": ((4, "affine"), {"group_size": 64, "embeddings": "int8"}),
}
TRELLISES = {"trellis2-int8-embedding": 2, "trellis3-int8-embedding": 3}  # bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="125m")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--models", nargs="+", choices=(*RECIPES, *TRELLISES), default=tuple(RECIPES))
    parser.add_argument("--activations", nargs="+", choices=("exact", "int8"), default=("exact", "int8"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64, help="generated for the decoding rate")
    parser.add_argument("--windows", type=int, default=4, help=f"of {CONTEXT} tokens, evaluated")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--openvino-python", help="interpreter that has optimum-intel[openvino]; default: this one")
    parser.add_argument("--without", nargs="+", default=(), choices=("transformers", "openvino"))
    parser.add_argument("--temp", type=Path, help="where the models are written, and deleted afterwards")
    parser.add_argument("--json", type=Path, help="default: eval/results/run-SHAPE.json; parts not run are kept")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        tool, source, windows, activations = args.child
        print(json.dumps(evaluate(tool, source, int(windows), activations, args.threads)))
        return
    target = args.json or ROOT / "eval" / "results" / f"run-{args.shape}.json"
    what = f"GPT-Neo {args.shape} shapes, random weights, on the CPU with {args.threads} threads"
    with tempfile.TemporaryDirectory(prefix="neoquant-bench-", dir=args.temp) as temp:
        for part, found in bench(args, Path(temp)):
            kept = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
            target.write_text(json.dumps({**kept, "what": what, part: found}, indent=1) + "\n", encoding="utf-8")
            print(f"{part} written to {target}", flush=True)


def bench(args: argparse.Namespace, temp: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Make the models and run the parts that are asked for, one after the other; each is given with where and when it
    was run."""
    from neoquant.benchmark.run import Request, measure

    print(f"making {args.shape}-shaped checkpoints ...", flush=True)
    plain = temp / "plain"
    make_source(args.shape, plain)
    models = quantized(plain, temp, args.models)
    peers = [peer for peer in ("transformers", "openvino") if peer not in args.without]
    pythons = {"openvino": args.openvino_python} if args.openvino_python and "openvino" in peers else {}
    lengths = {"decode": (32, args.new_tokens), "prefill": (CONTEXT, 2)}
    for part in args.parts:
        if part == "evaluate":
            found = evaluations(models, plain, args, peers)
        else:
            prompt, new = lengths[part]
            request = Request(
                list(map(str, models)), peers, base=str(plain), prompt=prompt, new=new,
                repeats=args.repeats, threads=args.threads, pythons=pythons, activations=args.activations,
                without_bf16=True,
            )  # fmt: skip
            found = measure(request).model_dump(mode="json")
            for program in found["programs"]:
                print(part, program["label"], {key: round(value, 3) for key, value in program["median"].items()})
        if part == "decode":
            found |= {"bandwidth_gb_per_s": bandwidth(args.threads), "bytes_a_token": bytes_a_token([plain, *models])}
        yield part, {"provenance": provenance(PACKAGES), **found}


def quantized(plain: Path, temp: Path, names: list[str]) -> list[Path]:
    """The folders that neoquant runs, named for what they hold."""
    from neoquant.quantization.quantize import quantize
    from neoquant.quantization.recipe import Recipe

    folders = []
    for name in names:
        if name in TRELLISES:
            rules = [
                {"match": "*h.0.*", "bits": TRELLISES[name], "type": "trellis"},
                {"match": "*", "bits": 8, "type": "int8"},
            ]
            recipe = Recipe.model_validate({"name": name, "embeddings": "int8", "rules": rules})
        else:
            recipe = Recipe.simple(*RECIPES[name][0], **RECIPES[name][1])
        folders.append(quantize(plain, temp / name, recipe).folder)
        if name in TRELLISES:
            repeat_first_block(folders[-1])
    return folders


def repeat_first_block(folder: Path) -> None:
    """Put the first block's tensors in the places of every other's."""
    from safetensors.torch import load_file, save_file

    layers = json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_layers"]
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".h." not in name}
    for name, tensor in tensors.items():
        if ".h.0." in name:
            kept |= {name.replace(".h.0.", f".h.{layer}."): tensor.clone() for layer in range(layers)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def bytes_a_token(folders: list[Path]) -> dict[str, int]:
    """Bytes of weights that decoding one token reads: everything but positions, which is one row."""
    from neoquant.checkpoint import open_checkpoint

    found = {}
    for folder in folders:
        with open_checkpoint(folder, headers_only=True) as checkpoint:
            found[folder.name] = sum(h.nbytes for name, h in checkpoint.headers.items() if ".wpe." not in name)
    return found


def bandwidth(threads: int) -> float:
    """Gigabytes a second that a sum over 512 MB reads, the best of ten."""
    import torch

    torch.set_num_threads(threads)
    numbers = torch.ones(1 << 27)
    best = min(timed(numbers.sum) for _ in range(10))
    return round(numbers.nbytes / best / 1e9, 2)


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def evaluations(models: list[Path], plain: Path, args: argparse.Namespace, peers: list[str]) -> dict[str, Any]:
    """Tokens a second of scoring the same windows, in turn."""
    lanes = [("neoquant", model, kind) for model in models for kind in args.activations]
    if "transformers" in peers:
        lanes.append(("transformers", plain, "exact"))
    runs: dict[str, list[float]] = {}
    for repeat in range(args.repeats):
        for tool, source, kind in lanes if repeat % 2 == 0 else lanes[::-1]:
            command = [sys.executable, __file__, "--threads", str(args.threads)]
            command += ["--child", tool, str(source), str(args.windows), kind]
            done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=True)
            label = f"{tool}: {source.name}" + ("" if kind == "exact" else f", {kind} activations")
            runs.setdefault(label, []).append(json.loads(done.stdout.splitlines()[-1])["tokens_per_s"])
    median = {label: round(statistics.median(found), 2) for label, found in runs.items()}
    print("evaluate", median)
    return {"windows": args.windows, "context": CONTEXT, "tokens_per_s": runs, "median": median}


def evaluate(tool: str, source: str, windows: int, activations: str, threads: int) -> dict[str, float]:
    """Score windows of random tokens: with neoquant's evaluation, or as transformers' users do, window by window."""
    import torch

    torch.set_num_threads(threads)
    ids = torch.randint(0, 50257, (windows, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    if tool == "neoquant":
        from neoquant.evaluation.corpus import Corpus, Unit, Window
        from neoquant.evaluation.scoring import score
        from neoquant.loading.load import load_model
        from neoquant.loading.pretrained import GPTNeoForCausalLM
        from neoquant.progress import SILENT

        model = load_model(source, GPTNeoForCausalLM, device="cpu", activations=activations)

        def corpus(rows: torch.Tensor) -> Corpus:
            units = tuple(Unit(str(row), "random", rows.shape[1] - 1, 1) for row in range(len(rows)))
            cut = tuple(Window(row, rows[row].int(), rows.shape[1] - 1) for row in range(len(rows)))
            return Corpus(None, None, "", {"random": len(rows)}, units, cut, ())  # type: ignore[arg-type]

        def run(rows: torch.Tensor) -> None:
            score([model], corpus(rows), SILENT)

    else:
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        theirs.train(False)

        @torch.inference_mode()
        def run(rows: torch.Tensor) -> None:
            for row in rows:
                logits = theirs(row[None, :-1]).logits[0]
                torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").item()

    run(ids[:1, :65])
    return {"tokens_per_s": windows * CONTEXT / timed(lambda: run(ids))}


if __name__ == "__main__":
    main()
