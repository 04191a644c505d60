"""`neoquant convert`: the same weights in another format."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from neoquant.cli import options
from neoquant.cli.models import find_model, short_name
from neoquant.cli.output import check_output_file, json_kind, write_text
from neoquant.cli.terminal import Terminal
from neoquant.errors import RequestError
from neoquant.report.formatting import duration
from neoquant.sizes import parse_size, plural, size

ONNX = "onnx"


def convert(
    ctx: typer.Context,
    model: options.Model = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="bitsandbytes, gptq (or gptq-v1, gptq-v2), compressed-tensors or neoquant; safetensors for a model "
            "that is not quantized, from pytorch_model.bin; onnx for ONNX Runtime (the extra onnx).",
            show_default=False,
        ),
    ] = None,
    dequantize: Annotated[
        bool,
        typer.Option("--dequantize", help="Write plain weights, which every program reads."),
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="TYPE",
            help="Of plain weights: float16, bfloat16 or float32. [default: the source's]",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Output folder. [default: MODEL-FORMAT, here]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing folder.")] = False,
    shard_size: options.ShardSize = "5GB",
    revision: options.Revision = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write how each tensor was converted to FILE.")
    ] = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Convert a model to another format without rounding again, by an atomic write of a new folder.

    Codes and scales stay the same, bit for bit. A format that cannot hold them is refused, with those that
    can: bitsandbytes and neoquant hold nf4, fp4 and int8; gptq, compressed-tensors and neoquant hold affine
    grids.

    \b
    Examples:
      neoquant convert gpt-neo-gptq --to compressed-tensors
      neoquant convert gpt-neo-nf4 --dequantize --dtype float16 --out gpt-neo-plain
      neoquant convert EleutherAI/gpt-neo-125m --to safetensors --dtype float16
      neoquant convert gpt-neo-nf4 --to onnx
    """
    from neoquant.quantization.convert import PLAIN
    from neoquant.quantization.convert import convert as convert_checkpoint

    terminal: Terminal = ctx.obj
    check_output_file(json_file, json_kind("conversion"), terminal, inputs=[model], force=force)
    largest = parse_size(shard_size, "--shard-size")
    if to == ONNX:
        _export(
            terminal, model, out, revision, force, {"--dequantize": dequantize, "--dtype": dtype, "--json": json_file}
        )
        return
    source = find_model(model, terminal, "convert")
    folder = out or Path(f"{short_name(model)}-{to or PLAIN}")
    made = convert_checkpoint(
        source,
        folder,
        to,
        dequantize=dequantize,
        dtype=dtype,
        revision=revision,
        force=force,
        shard_size=largest,
        progress=terminal.progress,
    )
    if json_file is not None:
        written = {"schema_version": "neoquant.conversion/1", **made.to_dict()}
        write_text(json_file, json.dumps(written, indent=1) + "\n", terminal)
    for note in made.notes:
        terminal.note(f"note: {note}")
    layers = sum(row["action"] != "copy" and row["action"] != "drop" for row in made.tensors)
    terminal.show(
        f"{folder}: {made.before} -> {made.after}, {plural(layers, 'quantized layer')} of "
        f"{plural(len(made.tensors), 'tensor')}, "
        f"{size(made.source_bytes)} -> {size(made.weights_bytes)}"
    )
    terminal.note(f"took {duration(made.seconds)} and {size(made.peak_rss_bytes)} of memory")


def _export(
    terminal: Terminal, model: str | None, out: Path | None, revision: str | None, force: bool, others: dict[str, Any]
) -> None:
    """`convert --to onnx`."""
    if (idle := next((name for name, value in others.items() if value), None)) is not None:
        raise RequestError(f"{idle} is for folders of safetensors: --to onnx takes --out, --revision and --force")
    if find_spec("onnx") is None:
        raise RequestError("--to onnx needs the package onnx, which is not installed: pip install 'neoquant[onnx]'")
    from neoquant.onnx import export

    source = find_model(model, terminal, "convert")
    folder = out or Path(f"{short_name(model)}-{ONNX}")
    made = export(source, folder, revision=revision, force=force, progress=terminal.progress)
    terminal.show(f"{made.file}: {made.quantized_layers} quantized layers, {size(made.weights_bytes)}")
