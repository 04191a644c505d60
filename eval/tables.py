"""Write the measured tables into README.md, the docs, eval/README.md and the bundled model's card, from the committed
results.

    python eval/tables.py            # rewrite what stands between the markers
    python eval/tables.py --check    # exit 1 where a text is not what the results say

eval/README.md says which script makes which result anew.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from choices import WAYS, choices

from neoquant.evaluation import Comparison, Inspection
from neoquant.model.names import BLOCK_LINEARS

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "eval" / "results" / "demo.json"
LAYERS = ROOT / "eval" / "results" / "demo-layers.json"
BENCH = ROOT / "eval" / "results" / "quantize-1.3b.json"
CALIBRATED = {shape: ROOT / "eval" / "results" / f"calibrated-{shape}.json" for shape in ("125m", "1.3b")}
RUN = {name: ROOT / "eval" / "results" / f"run-{name}.json" for name in ("125m", "1.3b", "125m-avx2", "125m-amx")}
CPUS = {"": "", "avx2": " without AVX-512", "amx": " with AMX"}  # what the last part of such a name says
CONTEXT = {shape: ROOT / "eval" / "results" / f"context-{shape}.json" for shape in ("125m", "1.3b")}
CACHE_LOSS = {kind: ROOT / "eval" / "results" / f"cache-{kind}-demo.json" for kind in ("float16", "int8")}
SPECULATIVE = ROOT / "eval" / "results" / "speculative-demo.json"
BATCH = ROOT / "eval" / "results" / "batch-demo.json"
BUSY = {
    name: ROOT / "eval" / "results" / f"busy-{name}.json" for name in ("demo-decode", "demo-evaluate", "125m-decode")
}
INSIDE = {
    path.stem.removeprefix("inside-transformers-"): path
    for path in sorted((ROOT / "eval" / "results").glob("inside-transformers-*.json"))
}
ONNX = {shape: ROOT / "eval" / "results" / f"onnx-runtime-{shape}.json" for shape in ("demo", "125m")}
FEEDBACK = ROOT / "eval" / "results" / "feedback-neo-8m.json"
FEEDBACK_DEMO = ROOT / "eval" / "results" / "feedback-demo.json"
PEERS_DEMO = ROOT / "eval" / "results" / "peers-demo.json"
BY_LOSS = {"objective": "model", "correction": 0.5}
ATTENTION = {"objective": "attention", "correction": 0.0}
OBJECTIVES = {name: ROOT / "eval" / "results" / f"objectives-{name}.json" for name in ("demo", "neo-8m")}
OUTPUT_DAMPING = {  # what each column says
    name: (ROOT / "eval" / "results" / f"output-damping-{file}.json", label)
    for name, file, label in (
        ("bundled model, 3 bits", "demo", "3 bits, groups of 64, asymmetric"),
        ("bundled model, NF4", "demo", "NF4, double quantization"),
        ("neo-8m, 3 bits", "neo-8m", "3 bits, groups of 64, asymmetric"),
        ("neo-8m, NF4", "neo-8m", "NF4, double quantization"),
        ("bundled model, 3 bits, 4 x 128 tokens", "demo-few", "3 bits, groups of 64, asymmetric"),
    )
}
TO_ORDER = ROOT / "eval" / "results" / "to-order-demo.json"
TUNED = ROOT / "eval" / "results" / "tuned-demo.json"
HQQ = {name: ROOT / "eval" / "results" / f"hqq-{name}.json" for name in ("demo", "neo-8m")}
CROSS_LOAD = ROOT / "eval" / "results" / "cross-load.json"
THEIR_TESTS = sorted((ROOT / "eval" / "results").glob("transformers-tests-*.json"))
CHOOSING = ROOT / "docs" / "choosing.md"
CARD = ROOT / "neoquant" / "demo" / "neoquant-demo" / "README.md"
PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "report.md",
    ROOT / "docs" / "speed.md",
    CHOOSING,
    ROOT / "eval" / "README.md",
    CARD,
)


WHY_COLUMNS = ("neoquant", "bitsandbytes", "llm-compressor", "GPTQModel", "OpenVINO")


def why() -> str:
    """The README's first table: the same bits, formats and work beside other programs, on both test models."""
    lines = [f"| | {' | '.join(WHY_COLUMNS)} |", f"| --- |{' --: |' * len(WHY_COLUMNS)}"]

    def line(what: str, figures: dict[str, str]) -> None:
        cells = [figures.get(name, "") for name in WHY_COLUMNS]
        lines.append(f"| {what} | **{cells[0]}** | {' | '.join(cells[1:])} |")

    models = {"bundled model": FEEDBACK_DEMO, "neo-8m": FEEDBACK}
    for grid, what, rounded in (
        ("4 bits, groups of 64, asymmetric", "KL, GPTQ with 4 bits in groups of 64", None),
        ("NF4, double quantization", "KL, NF4 in bitsandbytes' format", "bitsandbytes"),
    ):
        for model, path in models.items():
            kls = _kl_by_tool(path, grid)
            if rounded:
                kls[rounded] = kls["nearest"]  # round-to-nearest gives that program's own bytes
            line(f"{what}, {model}", {tool: f"{kl:.2g}" for tool, kl in kls.items()})
    cost = "{work_s:.0f} s, {peak_rss_mb:,.0f} MB".format_map
    whole = "{wall_s:.1f} s, {peak_rss_mb:,.0f} MB".format_map
    bench = json.loads(BENCH.read_text("utf-8"))["median"]
    quantizing = {"neoquant": whole(bench["neoquant-unsynced"]), "bitsandbytes": whole(bench["transformers"])}
    line("quantize 1.3B to NF4: the whole command, memory", quantizing)
    gptq = json.loads(CALIBRATED["125m"].read_text("utf-8"))["median"]
    line("GPTQ of 125M on 32 x 512 tokens: time, memory", {tool: cost(median) for tool, median in gptq.items()})
    decode = json.loads(RUN["1.3b"].read_text("utf-8"))["decode"]["programs"]
    rates = {_run_label(each["tool"], each["label"]): each["median"]["decode_tokens_per_s"] for each in decode}
    bnb = [rates[f"transformers + bitsandbytes: NF4{how}"] for how in ("", ", as without bf16 instructions")]
    line(
        "generate with 1.3B in 4 bits, tokens/s",
        {
            "neoquant": f"{rates['neoquant: NF4, embedding in float16']:.1f}",
            "bitsandbytes": f"{bnb[0]:.1f} ({bnb[1]:.1f} without bf16 instructions)",
            "OpenVINO": f"{rates['OpenVINO: int4, groups of 64, embedding in int8']:.1f}",
        },
    )
    return "\n".join(lines)


def _kl_by_tool(path: Path, grid: str) -> dict[str, float]:
    rows = json.loads(path.read_text("utf-8"))["rows"]
    return {row["tool"]: _kl(row) for row in rows if row["label"] == grid}


def demo_totals() -> str:
    """A line for each candidate on the suite `demo`, in total."""
    result = _demo()
    reference = result.reference
    lines = [
        "| model | MB | bits/weight: linears, model | bits/byte | perplexity | Δ nats/token [95 %] | top-1 | KL |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
        f"| {reference.model.name} (fp16) | {_mb(reference.model.bytes_on_disk)} | 16, 16 "
        f"| {reference.total.bits_per_byte:.4f} | {reference.total.perplexity:.3f} | | | |",
    ]
    for candidate in result.candidates:
        model, total, change = candidate.evaluation.model, candidate.evaluation.total, candidate.total
        lines.append(
            f"| {model.name.removeprefix('neoquant-demo-')} | {_mb(model.bytes_on_disk)} "
            f"| {_bits(model.bits_per_weight_linears)}, {_bits(model.bits_per_weight_model)} "
            f"| {total.bits_per_byte:.4f} | {total.perplexity:.3f} "
            f"| {change.nats_per_token:+.4f} [{change.low:+.4f}, {change.high:+.4f}] "
            f"| {100 * change.agreement:.2f} % | {change.kl:.2g} |"
        )
    total, environment = reference.total, reference.environment
    return "\n".join(
        [
            *lines,
            "",
            f"{total.documents} documents, {total.tokens:,} tokens, {total.bytes:,} bytes of Python "
            f"{reference.data.revision}'s standard library that the model was not trained on; computed in "
            f"{environment.dtype} on {environment.device}, torch {environment.torch}.",
        ]
    )


def choosing() -> str:
    """Every grid's bits, and its loss by each way of rounding to it; the least of each grid stands out."""
    lines = [f"| grid | bits/weight | {' | '.join(WAYS)} |", f"| --- | --: |{' --: |' * len(WAYS)}"]
    for grid, bits, losses in choices():
        least = min(losses.values())
        cells = [f"{losses[way]:.2g}" if way in losses else "" for way in WAYS]
        marked = [f"**{cell}**" if losses.get(way) == least else cell for way, cell in zip(WAYS, cells, strict=True)]
        lines.append(f"| {grid} | {bits:.2f} | {' | '.join(marked)} |")
    return "\n".join(lines)


def demo_subsets() -> str:
    """The unquantized bundled model on each subset of the suite `demo`."""
    reference = _demo().reference
    lines = ["| subset | documents | bytes | bits/byte |", "| --- | --: | --: | --: |"]
    for score in [*reference.subsets, reference.total]:
        lines.append(f"| {score.subset} | {score.documents} | {score.bytes:,} | {score.bits_per_byte:.4f} |")
    return "\n".join(lines)


def demo_layers() -> str:
    """How much each layer of the bundled model loses alone, blocks down and projections across."""
    result = Inspection.from_json(LAYERS.read_text("utf-8"))
    lines = [
        f"| block | {' | '.join(name.rpartition('.')[2] for name in BLOCK_LINEARS)} |",
        f"| --- |{' --: |' * len(BLOCK_LINEARS)}",
    ]
    losses = {(layer.block, layer.projection): layer.loss for layer in result.layers}
    for number, attention in dict.fromkeys((layer.block, layer.attention) for layer in result.layers):
        cells = [f"{1000 * loss.kl:.2f}" if (loss := losses[number, name]) else "" for name in BLOCK_LINEARS]
        lines.append(f"| {number} {attention} | {' | '.join(cells)} |")
    added = sum(loss.kl for loss in losses.values() if loss)
    lines += [
        "",
        f"On {result.windows} windows of suite {result.suite.name}, {result.tokens:,} tokens. They add up to "
        f"{1000 * added:.1f}; with all layers quantized together the KL is {1000 * result.together.kl:.1f}.",
    ]
    return "\n".join(lines)


def bench_1p3b() -> str:
    """Time and memory of quantizing 1.3B, beside transformers + bitsandbytes and a plain copy of the file."""
    result = json.loads(BENCH.read_text("utf-8"))
    names = {
        "neoquant": "neoquant, with fsync",
        "neoquant-unsynced": "neoquant, without fsync",
        "transformers": "transformers + bitsandbytes, without fsync",
        "copy": "copying the source, with fsync",
    }
    lines = ["| | whole process, s | without imports, s | peak memory, MB |", "| --- | --: | --: | --: |"]
    for tool, median in result["median"].items():
        name = names[tool]
        lines.append(f"| {name} | {median['wall_s']:.1f} | {median['work_s']:.1f} | {median['peak_rss_mb']:,.0f} |")
    made = result["provenance"]
    versions = made["versions"]
    same = "The tensors are the same, byte by byte." if result["same_tensors"] else "The tensors DIFFER."
    return "\n".join(
        [
            *lines,
            "",
            f"Medians of {len(result['runs']['neoquant'])}, in turn, on {made['cores']} cores of an {made['cpu']}; "
            f"torch {versions['torch']}, transformers {versions['transformers']}, "
            f"bitsandbytes {versions['bitsandbytes']}. {same}",
        ]
    )


def calibrated() -> str:
    """Time and memory of GPTQ, beside llm-compressor where it was run."""
    lines = ["| shapes | text | | work, s | peak memory, MB |", "| --- | --- | --- | --: | --: |"]
    notes = []
    for shape, path in CALIBRATED.items():
        result = json.loads(path.read_text("utf-8"))
        for tool, median in result["median"].items():
            text = f"{result['rows']} x {result['length']}"
            lines.append(f"| {shape} | {text} | {tool} | {median['work_s']:.1f} | {median['peak_rss_mb']:,.0f} |")
        made, repeats = result["provenance"], len(result["runs"]["neoquant"])
        peer = "".join(f", {name} {version}" for name, version in result.get("peer", {}).items() if name != "torch")
        runs = f"medians of {repeats} in turn" if repeats > 1 else "one run"
        notes.append(
            f"{shape}: {runs}, {made['cores']} cores of an {made['cpu']}, torch {made['versions']['torch']}{peer}"
        )
    return "\n".join([*lines, "", "; ".join(notes) + "."])


PROGRAMS = ("torch", "transformers", "bitsandbytes", "openvino")
RUN_NAMES = {
    "nf4": "NF4, embedding in float16",
    "nf4-int8-embedding": "NF4, embedding in int8",
    "affine4-g64-int8-embedding": "affine, groups of 64, embedding in int8",
}


def run(name: str) -> str:
    """Tokens a second and peak memory of running a model's shapes, by program; the name may say which CPU ran them."""
    result = json.loads(RUN[name].read_text("utf-8"))
    shape, _, isa = name.partition("-")
    found: dict[str, dict[str, Any]] = {}
    for part in ("decode", "prefill"):
        for program in result[part]["programs"]:
            found.setdefault(_run_label(program["tool"], program["label"]), {})[part] = program["median"]
    for label, rate in result["evaluate"]["median"].items():
        tool, _, source = label.partition(": ")
        found.setdefault(_run_label(tool, f"{tool}: {source}"), {})["evaluate"] = rate
    lines = [
        "| | load, s | decode, tokens/s | of the bandwidth limit | prefill of 1,024, tokens/s | evaluate, tokens/s "
        "| peak while generating, MB |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    read = {RUN_NAMES.get(name, name): size for name, size in result["decode"]["bytes_a_token"].items()}
    for label, parts in found.items():
        decode, prefill = parts.get("decode"), parts.get("prefill")
        size = read.get(label.removeprefix("neoquant: ").removesuffix(", int8 activations"))
        part = decode and size and decode["decode_tokens_per_s"] * size / result["decode"]["bandwidth_gb_per_s"] / 1e9
        cells = [
            f"{decode['load_s']:.1f}" if decode else "",
            f"{decode['decode_tokens_per_s']:.1f}" if decode else "",
            f"{100 * part:.0f} %" if part else "",
            f"{prefill['prefill_tokens_per_s']:.0f}" if prefill else "",
            f"{parts['evaluate']:.0f}" if "evaluate" in parts else "",
            f"{decode['peak_rss_bytes'] / 1e6:,.0f}" if decode else "",
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    made, decode = result["decode"]["provenance"], result["decode"]
    versions = {name: found for program in decode["programs"] for name, found in program["versions"].items()}
    evaluated = len(next(iter(result["evaluate"]["tokens_per_s"].values())))
    fewer = f" (evaluating: {evaluated})" if evaluated != decode["repeats"] else ""
    shown = ", ".join(f"{name} {versions[name]}" for name in PROGRAMS if name in versions)
    return "\n".join(
        [
            *lines,
            "",
            f"GPT-Neo {shape} shapes, random weights, in float32; medians of {decode['repeats']} runs in turn{fewer}, "
            f"{decode['threads']} threads of an {made['cpu']}{CPUS[isa]}, "
            f"{decode['bandwidth_gb_per_s']:.0f} GB/s read; {shown}.",
        ]
    )


def _run_label(tool: str, label: str) -> str:
    source, *rest = label.partition(": ")[2].split(", ")
    if tool == "neoquant":
        return ", ".join([f"neoquant: {RUN_NAMES.get(source, source)}", *rest])
    named = {"transformers": "transformers: float32", "openvino": "OpenVINO: int4, groups of 64, embedding in int8"}
    if tool == "bitsandbytes-without-bf16":
        return "transformers + bitsandbytes: NF4, as without bf16 instructions"
    return named.get(tool, "transformers + bitsandbytes: NF4")


def context() -> str:
    """Decoding behind a short and a long text, by the type that keys and values are held in."""
    lines, notes = [], []
    for shape, path in CONTEXT.items():
        if not path.exists():
            continue
        result = json.loads(path.read_text("utf-8"))
        first, last = list(next(iter(result["median"].values())))
        if not lines:
            lines = [
                f"| shapes | keys and values in | tokens/s at {first} | at {int(last):,} | ratio | they take, MB |",
                "| --- | --- | --: | --: | --: | --: |",
            ]
        for way, median in result["median"].items():
            held = result["cache_bytes"].get(way)
            name = f"{way}, float32" if way == "transformers" else way
            lines.append(
                f"| {shape} | {name} | {median[first]:.1f} | {median[last]:.1f} | {result['ratio'][way]:.2f} | "
                f"{'' if held is None else f'{held / 1e6:.0f}'} |"
            )
        notes.append(f"{shape}: {_how(result)}")
    return "\n".join([*lines, "", "NF4 with an int8 embedding, random weights; " + "; ".join(notes) + "."])


def cache_loss() -> str:
    """What holding keys and values in fewer bits loses, by the type."""
    lines = ["| keys and values in | Δ nats/token [95 %] | KL | same top token |", "| --- | --: | --: | --: |"]
    for storage, path in CACHE_LOSS.items():
        if path.exists():
            total = json.loads(path.read_text("utf-8"))["candidates"][0]["total"]
            change = f"{total['nats_per_token']:+.4f} [{total['low']:+.4f}, {total['high']:+.4f}]"
            lines.append(f"| {storage} | {change} | {total['kl']:.2g} | {100 * total['agreement']:.2f} % |")
    return "\n".join([*lines, "", "The bundled model on its own suite, against itself."])


def speculative(path: Path) -> str:
    """Tokens a second with guesses, and what products of several rows cost."""
    result = json.loads(path.read_text("utf-8"))
    names = {
        "plain": "one token after another",
        "lookup": "guesses by lookup",
        "2bit": "guesses by the model in 2 bits",
    }
    lines = ["| | tokens/s | x | tokens a step | guesses accepted |", "| --- | --: | --: | --: | --: |"]
    for way, median in result["median"].items():
        count = result["accepted"].get(way)
        steps = "1.00" if count is None else f"{1 + count['accepted'] / count['steps']:.2f}"
        rate = "" if count is None else f"{100 * count['accepted'] / max(1, count['drafted']):.0f} %"
        lines.append(f"| {names[way]} | {median:.1f} | {result['ratio'][way]:.2f} | {steps} | {rate} |")
    rows = len(next(iter(result["products"]["1.3b"].values())))
    lines += ["", f"| rows of a product | {' | '.join(map(str, range(1, rows + 1)))} |", f"| --- |{' --: |' * rows}"]
    for activations, times in result["products"]["1.3b"].items():
        lines.append(f"| {activations} activations: times of one row | {' | '.join(f'{t:.2f}' for t in times)} |")
    files = f"{len(result['files'])} files of Python's standard library, {result['prompt_tokens']} tokens each"
    return "\n".join(
        [
            *lines,
            "",
            f"{files}, {result['new_tokens']} new ones, greedily; products with NF4 weights of 8,192 x "
            f"2,048; {_how(result)}.",
        ]
    )


def batch(path: Path) -> str:
    """Tokens a second of many sequences together."""
    result = json.loads(path.read_text("utf-8"))
    sizes = list(next(iter(result["median"].values())))
    lines = [f"| tokens/s of so many sequences | {' | '.join(sizes)} |", f"| --- |{' --: |' * len(sizes)}"]
    for kind, median in result["median"].items():
        cells = [f"{median[b]:.0f} ({result['ratio'][kind][b]:.1f} x)" for b in sizes]
        lines.append(f"| {kind} activations | {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", f"{result['prompt_tokens']} tokens of prompt, {result['new_tokens']} new ones; {_how(result)}."]
    )


def busy(path: Path) -> str:
    """Tokens a second beside busy loops, the share of the speed alone, and CPU time."""
    result = json.loads(path.read_text("utf-8"))
    loads = list(next(iter(result["median"].values())))
    lines = [
        f"| tokens/s | {' | '.join(loads)} | CPU ms a token, {loads[0]} | and with {loads[-1]} |",
        f"| --- |{' --: |' * (len(loads) + 2)}",
    ]
    for way, median in result["median"].items():
        kept, cpu, more = (result[name][way] for name in ("of_the_speed_alone", "median_cpu", "of_the_cpu_time_alone"))
        cells = [_sized(median[load]) + ("" if load == loads[0] else f" ({kept[load]:.2f})") for load in loads]
        cells += [_sized(cpu[loads[0]]), f"{_sized(cpu[loads[-1]])} ({more[loads[-1]]:.2f})"]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    turns = len(next(iter(result["tokens_per_s"].values()))[loads[0]])
    return "\n".join(
        [
            *lines,
            "",
            f"{result['what']}; medians of {turns} turns, in parentheses of the same turn alone; {_how(result)}.",
        ]
    )


def _sized(number: float) -> str:
    """To about three digits."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def onnx_runtime() -> str:
    """Tokens a second of ONNX Runtime and of neoquant on the same codes."""
    lines = ["| model | weights | prefill: ONNX Runtime, neoquant | decode: ONNX Runtime, neoquant |"]
    lines.append("| --- | --- | --: | --: |")
    results = [json.loads(path.read_text("utf-8")) for path in ONNX.values() if path.exists()]
    for result in results:
        for recipe, rates in result["rates"].items():
            theirs, ours = rates["ONNX Runtime"], rates["neoquant"]
            cells = (f"{theirs[what]:,.0f}, {ours[what]:,.0f}" for what in ("prefill", "decode"))
            lines.append(f"| {result['shape']} | {recipe} | {' | '.join(cells)} |")
    version = results[-1]["provenance"]["versions"]["onnxruntime"]
    note = (
        f"{results[-1]['prefill']} tokens of prefill; decoding behind {results[-1]['prompt']}. ONNX Runtime {version}"
    )
    return "\n".join([*lines, "", f"{note}; {_how(results[-1])}."])


def inside(path: Path) -> str:
    """Tokens a second in transformers and in neoquant, beside transformers' own float32."""
    result = json.loads(path.read_text("utf-8"))
    lines = [
        "| tokens/s | decode | x | with beams | prefill | x |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    base = next(iter(result["rates"].values()))
    for name, rates in result["rates"].items():
        beams = f"{rates['decode with beams']:.1f}" if "decode with beams" in rates else ""
        decode, prefill = (f"{rates[what]:.1f} | {rates[what] / base[what]:.2f}" for what in ("decode", "prefill"))
        lines.append(f"| {name} | {decode} | {beams} | {prefill} |")
    how = f"{result['new']} tokens behind {result['prompt']}, {result['beams']} beams, {result['prefill']} of prefill"
    return "\n".join([*lines, "", f"{how}; medians of {result['repeats']} rounds in turn, {_how(result)}."])


def _how(result: dict[str, Any]) -> str:
    """What a result was measured on."""
    made = result["provenance"]
    threads = f"{result['threads']} thread{'s' * (result['threads'] > 1)}"
    return f"{threads} of {made['cores']} cores of {made['cpu']}, torch {made['versions']['torch']}"


def feedback(path: Path) -> str:
    """Each tool's GPTQ on each grid, and ours as a part of the best peer's divergence."""
    result = json.loads(path.read_text("utf-8"))
    grids = list(dict.fromkeys(row["label"] for row in result["rows"]))
    tools = [tool for tool in dict.fromkeys(row["tool"] for row in result["rows"]) if tool != "neoquant"]
    names = [{"nearest": "round-to-nearest"}.get(tool, tool) for tool in tools]
    lines = [
        f"| grid | {' | '.join(names)} | neoquant | of the best peer [95 %] | Δ nats/token: best peer, neoquant |",
        f"| --- |{' --: |' * len(tools)} --: | --: | --: |",
    ]
    for grid in grids:
        rows = {row["tool"]: row for row in result["rows"] if row["label"] == grid}
        best = min((row for tool, row in rows.items() if tool not in ("neoquant", "nearest")), key=_kl, default=None)
        best = best or rows["nearest"]  # nobody else has GPTQ on this grid
        ratio = next(r for r in result["ratios"] if r["label"] == grid and r["peer"] == best["tool"])
        figures = [f"{1e4 * _kl(rows[tool]):.2f}" if tool in rows else "" for tool in [*tools, "neoquant"]]
        low, high = ratio["interval"]
        lines.append(
            f"| {grid} | {' | '.join(figures)} | {ratio['ratio']:.3f} [{low:.3f}, {high:.3f}] "
            f"| {best['nats_per_token']:+.4f}, {rows['neoquant']['nats_per_token']:+.4f} |"
        )
    versions = [f"{name} {found[name]}" for name, found in result["peers"].items() if isinstance(found, dict)]
    return "\n".join([*lines, "", f"{_text_line(result)}; {', '.join(versions)}."])


def objectives(path: Path) -> str:
    """What GPTQ loses by the model's loss with earlier layers' errors made up for, as a part of its default's loss."""
    result = json.loads(path.read_text("utf-8"))
    by_loss, default = (next(n for n, o in result["options"].items() if o == each) for each in (BY_LOSS, ATTENTION))
    lines = [
        "| grid | default (`attention`) | `model`, correction 0.5 | of the default [95 %] |",
        "| --- | --: | --: | --: |",
    ]
    for grid in dict.fromkeys(row["label"] for row in result["rows"]):
        rows = {row["tool"]: row for row in result["rows"] if row["label"] == grid}
        ratio = next(r for r in result["ratios"] if r["label"] == grid and r["peer"] == default)
        low, high = ratio["interval"]
        figures = f"{1e4 * _kl(rows[default]):.2f} | {1e4 * _kl(rows[by_loss]):.2f}"
        lines.append(f"| {grid} | {figures} | {ratio['ratio']:.3f} [{low:.3f}, {high:.3f}] |")
    return "\n".join([*lines, "", f"{_text_line(result)}."])


def output_damping() -> str:
    """What GPTQ by the model's loss loses, output-side Hessians damped in several ways, as a part of the first."""
    columns = {
        name: {row["way"]: row for row in json.loads(path.read_text("utf-8"))["rows"] if row["label"] == label}
        for name, (path, label) in OUTPUT_DAMPING.items()
    }
    lines = [f"| damped by | {' | '.join(columns)} |", f"| --- |{' --: |' * len(columns)}"]
    for way in dict.fromkeys(way for rows in columns.values() for way in rows):
        found = [rows.get(way) for rows in columns.values()]
        cells = [
            "" if row is None else "{:.3f} [{:.3f}, {:.3f}]".format(row["ratio"], *row["interval"]) for row in found
        ]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tuned() -> str:
    """What GPTQ by the model's loss loses before tuning and after it, and what that takes."""
    result = json.loads(TUNED.read_text("utf-8"))
    lines = ["| grid | before | after | of it [95 %] | processor s | MB |", "| --- | --: | --: | --: | --: | --: |"]
    for row in result["rows"]:
        low, high = row["ratio"]["interval"]
        seconds = [each for each in row["processor_s"] if each is not None]
        lines.append(
            f"| {row['label']} | {1e4 * _kl(row['before']):.2f} | {1e4 * _kl(row['after']):.2f} "
            f"| {row['ratio']['ratio']:.3f} [{low:.3f}, {high:.3f}] "
            f"| {f'{sum(seconds) / len(seconds):.0f}' if seconds else ''} | {row['memory_mb']:,.0f} |"
        )
    options = result["options"]
    return "\n".join(
        [*lines, "", f"{_text_line(result)}; tuned on {options['rows']} rows of {options['length']} tokens."]
    )


def to_order() -> str:
    """Uniform grids, layers on several grids at the same bits, and at others: loss foreseen and measured."""
    result = json.loads(TO_ORDER.read_text("utf-8"))
    lines = [
        "| layers | bits/weight | KL foreseen | KL measured | of the foreseen | of the uniform grid's [95 %] |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for row in result["rows"]:
        beside = f"{row['ratio']:.3f} [{row['interval'][0]:.3f}, {row['interval'][1]:.3f}]" if "ratio" in row else ""
        lines.append(
            f"| {_layers(row)} | {row['bits']:.3f} | {1e4 * row['foreseen']:.1f} | {1e4 * _kl(row):.1f} "
            f"| {row['of_foreseen']:.2f} | {beside} |"
        )
    shown, text = result["calibration"], result["text"]
    return "\n".join(
        [
            *lines,
            "",
            f"KL divergence from {result['model']['name']}, in 1e-4 nats a token, on {text['scored_tokens']:,} tokens; "
            f"{shown['rows']} rows of {shown['length']} tokens.",
        ]
    )


def _layers(row: dict[str, Any]) -> str:
    """How many layers are on which bits, in words."""
    if "layers" not in row:
        return f"all on {row['name'].removeprefix('uniform-')} bits"
    return ", ".join(f"{count} on {bits}" for bits, count in row["layers"].items() if count)


def _text_line(result: dict[str, Any]) -> str:
    """What was calibrated on and scored, in words."""
    seeds = result["seeds"]
    shown = seeds[0]["calibration"]
    documents = {name for seed in seeds for name in seed["scored"]["documents"]}
    tokens = sum(sum(seed["scored"]["tokens"]) for seed in seeds)
    return (
        f"Mean KL divergence from {result['model']['name']}, in 1e-4 nats a token. {len(seeds)} "
        f"{'seed' if len(seeds) == 1 else 'seeds'} of {shown['rows']} rows of {shown['length']} tokens; "
        f"{len(documents)} scored documents, {tokens:,} tokens in all"
    )


def _kl(row: dict[str, Any]) -> float:
    return float(row["kl"])


def hqq(path: Path) -> str:
    """Round-to-nearest, the HQQ library and ours on each grid, with integer zeros and with the library's float zeros,
    and each of ours as a part of the library's divergence."""
    result = json.loads(path.read_text("utf-8"))
    rows = {(row["bits"], row["group_size"], row["tool"]): row for row in result["rows"]}
    of_library = {(r["bits"], r["group_size"], r["ours"]): r for r in result["ratios"] if r["tool"] == "library"}
    lines = [
        "| grid | zeros | bits/weight | round-to-nearest | HQQ library | neoquant "
        "| of the library [95 %] | orders | median document |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for (bits, group_size, tool), ratio in of_library.items():
        ours, nearest, library = (rows[bits, group_size, name] for name in (tool, "nearest", "library"))
        low, high = ratio["interval"]
        alike = ours["bits_per_weight"] == library["bits_per_weight"]
        lines.append(
            f"| {bits} bits, groups of {group_size} | {'float16' if alike else 'integers'} "
            f"| {ours['bits_per_weight']:.3f} | {'' if alike else f'{1e4 * _kl(nearest):.2f}'} "
            f"| {f'{1e4 * _kl(library):.2f}' if alike else ''} | {1e4 * _kl(ours):.2f} "
            f"| {ratio['ratio']:.3f} [{low:.3f}, {high:.3f}] | {min(ratio['draws']):.2f} to {max(ratio['draws']):.2f} "
            f"| {ratio['median_document']:.3f} |"
        )
    tokens = sum(result["text"]["tokens"])
    return "\n".join(
        [
            *lines,
            "",
            f"Mean KL divergence from {result['model']['name']}, in 1e-4 nats a token, on {tokens:,} tokens, "
            f"of {result['draws']} orders of its units; hqq {result['peer']['hqq']}.",
        ]
    )


def cross_load() -> str:
    """How far logits are apart between the program that made a GPTQ checkpoint and the one that reads it."""
    result = json.loads(CROSS_LOAD.read_text("utf-8"))
    lines = ["| made by | read by | checkpoints | agree | largest difference |", "| --- | --- | --: | --: | --: |"]
    pairs = dict.fromkeys((row["made_by"], row["read_by"]) for row in result["rows"])
    for made_by, read_by in pairs:
        rows = [row for row in result["rows"] if (row["made_by"], row["read_by"]) == (made_by, read_by)]
        largest = max(row["difference"] for row in rows if "difference" in row)
        agreeing = sum(row["agrees"] for row in rows)
        lines.append(f"| {made_by} | {read_by} | {len(rows)} | {agreeing} | {largest:.1g} |")
    peer = ", ".join(f"{name} {version}" for name, version in result["peer"].items())
    return "\n".join([*lines, "", f"Differences of logits as a part of the largest logit, in float32; {peer}."])


def their_tests() -> str:
    """What becomes of transformers' own tests with neoquant's classes in the place of transformers'."""
    titles = ("transformers", "tests", "passed", "refused in words", "about transformers' inside", "failed")
    lines = ["| " + " | ".join(titles) + " |", "| --- | --- " + "| --: " * 4 + "|"]
    for path in THEIR_TESTS:
        result = json.loads(path.read_text("utf-8"))
        for group in [*sorted({row["group"] for row in result["rows"]}), None]:
            found = [row["outcome"] for row in result["rows"] if group in (row["group"], None)]
            counts = (found.count(outcome) for outcome in ("passes", "refused", "inside", "fails"))
            first = [result["peer"]["transformers"], f"{group or 'all'}: {len(found)}"]
            lines.append("| " + " | ".join([*first, *map(str, counts)]) + " |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "why": why,
    "demo-totals": demo_totals,
    "choosing": choosing,
    "demo-subsets": demo_subsets,
    "demo-layers": demo_layers,
    "bench-1p3b": bench_1p3b,
    "calibrated": calibrated,
    "context": context,
    "cache-loss": cache_loss,
    "speculative": functools.partial(speculative, SPECULATIVE),
    "batch": functools.partial(batch, BATCH),
    "onnx-runtime": onnx_runtime,
    **{f"inside-{shape}": functools.partial(inside, path) for shape, path in INSIDE.items()},
    **{f"busy-{name}": functools.partial(busy, path) for name, path in BUSY.items()},
    **{f"run-{shape}": functools.partial(run, shape) for shape in RUN},
    "feedback-neo-8m": lambda: feedback(FEEDBACK),
    "feedback-demo": lambda: feedback(FEEDBACK_DEMO),
    "peers-demo": lambda: feedback(PEERS_DEMO),
    **{f"objectives-{name}": functools.partial(objectives, path) for name, path in OBJECTIVES.items()},
    "output-damping": output_damping,
    **{f"hqq-{name}": functools.partial(hqq, path) for name, path in HQQ.items()},
    "to-order": to_order,
    "tuned": tuned,
    "cross-load": cross_load,
    "their-tests": their_tests,
}


def rendered(path: Path) -> str:
    """The file's text with every marked table as the results have it."""
    text = path.read_text("utf-8")
    for name, table in TABLES.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(?:(?<=-->\n)|\n)(<!-- end -->)", re.DOTALL)
        if marked.search(text):
            content = table()
            text = marked.sub(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text)  # type: ignore[misc]
    return text


def _demo() -> Comparison:
    return Comparison.from_json(DEMO.read_text("utf-8"))


def _mb(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.1f}"


def _bits(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where something would change")
    check = parser.parse_args().check
    stale = [path for path in PAGES if rendered(path) != path.read_text("utf-8")]
    for path in stale:
        if not check:
            path.write_text(rendered(path), "utf-8")
        print(f"{path.relative_to(ROOT)}: {'not what the results say' if check else 'rewritten'}")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
