"""`neoquant inspect`: where quantization cost what."""

from __future__ import annotations

from typing import Annotated

import typer

from neoquant.cli import options
from neoquant.cli.evaluation import choose_suite, load_contestant, publish
from neoquant.cli.models import BUNDLED
from neoquant.cli.output import check_writable
from neoquant.cli.terminal import Terminal


def inspect(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The quantized model: a folder or hub id.")],
    against: Annotated[
        str,
        typer.Option(
            "--against", metavar="BASE", help="The model it was made from: a folder, hub id, or neoquant-demo."
        ),
    ] = BUNDLED,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity",
            help="Also what the loss makes of each layer alone: BASE runs again from that layer on, once a layer.",
        ),
    ] = False,
    rows: Annotated[
        int, typer.Option("--rows", metavar="N", help="Windows of text, spread evenly over the suite.")
    ] = 16,
    suite: options.Suite = None,
    data: options.Data = None,
    subset: options.Subset = None,
    documents: options.Documents = None,
    exclude_calibrated: options.ExcludeCalibrated = False,
    context: options.Context = None,
    json: options.Json = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    revision: options.Revision = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Say where quantization cost what, layer by layer: each weight's error, the error of what the layer gives on
    BASE's own activations, and with --sensitivity the loss and divergence of BASE with that layer alone quantized.

    Errors are relative mean squares; the embedding and the head are left as they are in BASE. --revision is BASE's.

    \b
    Examples:
      neoquant inspect neoquant-demo-nf4 --against neoquant-demo --sensitivity
      neoquant inspect gpt-neo-1.3B-nf4 --against EleutherAI/gpt-neo-1.3B --suite pile-core --json layers.json
    """
    terminal: Terminal = ctx.obj
    check_writable(json)
    chosen = choose_suite(
        suite, against, data=data, subset=subset, documents=documents, protocol=None, context=context, stride=None
    )
    base, tokenizer = load_contestant(against, terminal, "inspect", revision=revision, device=device, dtype=dtype)
    other, _ = load_contestant(model, terminal, "inspect", revision=None, device=device, dtype=dtype)

    from neoquant.evaluation import inspect
    from neoquant.report.layers import inspection_table

    result = inspect(
        base,
        other,
        tokenizer,
        chosen,
        rows=rows,
        sensitivity=sensitivity,
        exclude_calibrated=exclude_calibrated,
        progress=terminal.progress,
    )
    publish(result, inspection_table(result), result.notes, json, terminal)
