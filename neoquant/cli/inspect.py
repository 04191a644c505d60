"""`neoquant inspect`: the accuracy loss of quantization, layer by layer."""

from __future__ import annotations

from typing import Annotated

import typer

from neoquant.cli import options
from neoquant.cli.evaluation import LoadOptions, SuiteOptions, choose_suite, inputs_of, load_evaluated_model, publish
from neoquant.cli.output import check_output_file, json_kind
from neoquant.cli.terminal import Terminal
from neoquant.demo import NAME as BUNDLED


def inspect(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The quantized model: a folder or hub id.")],
    base: Annotated[
        str,
        typer.Option(
            "--base",
            "--against",
            metavar="BASE",
            help="The model it was made from: a folder, hub id, or neoquant-demo.",
        ),
    ] = BUNDLED,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity",
            help="Also measure loss and KL with each layer alone quantized: BASE runs again from that layer on.",
        ),
    ] = False,
    rows: Annotated[
        int, typer.Option("--rows", metavar="N", help="Number of windows, spread evenly over the suite.")
    ] = 16,
    suite: options.Suite = None,
    data: options.Data = None,
    subset: options.Subset = None,
    documents: options.Documents = None,
    exclude_calibrated: options.ExcludeCalibrated = False,
    context: options.Context = None,
    json: options.Json = None,
    force: options.Force = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    revision: options.Revision = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure the accuracy loss layer by layer: the error of each weight, the error of the layer's output on BASE's
    activations, and with --sensitivity the loss and KL divergence of BASE with that layer alone quantized.

    Errors are relative mean squares. Embedding and head stay as in BASE. --revision applies to BASE.

    \b
    Examples:
      neoquant inspect neoquant-demo-nf4 --base neoquant-demo --sensitivity
      neoquant inspect gpt-neo-1.3B-nf4 --base EleutherAI/gpt-neo-1.3B --suite pile-core --json layers.json
    """
    terminal: Terminal = ctx.obj
    loading = LoadOptions.of(ctx.params)
    chosen = choose_suite(SuiteOptions.of(ctx.params), base)
    inputs = inputs_of(chosen, suite, base, model)
    check_output_file(json, json_kind("inspection"), terminal, inputs=inputs, force=force)
    reference, tokenizer = load_evaluated_model(base, terminal, "inspect", loading, revision)
    quantized, _ = load_evaluated_model(model, terminal, "inspect", loading)

    from neoquant.evaluation import inspect
    from neoquant.report.layers import inspection_table

    result = inspect(
        reference,
        quantized,
        tokenizer,
        chosen,
        rows=rows,
        sensitivity=sensitivity,
        exclude_calibrated=exclude_calibrated,
        progress=terminal.progress,
    )
    publish(result, inspection_table(result), result.notes, json, terminal)
