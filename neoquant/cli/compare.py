"""`neoquant compare`: what models lost against the one they were made from."""

from __future__ import annotations

from typing import Annotated

import typer

from neoquant.cli import options
from neoquant.cli.evaluation import choose_suite, load_contestant
from neoquant.cli.output import check_writable, write_text
from neoquant.cli.terminal import Terminal


def compare(
    ctx: typer.Context,
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The model to compare with: a folder, hub id, or neoquant-demo.")
    ],
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="One or more models made from it.")],
    suite: options.Suite = None,
    data: options.Data = None,
    subset: options.Subset = None,
    documents: options.Documents = None,
    exclude_calibrated: options.ExcludeCalibrated = False,
    context: options.Context = None,
    protocol: options.Protocol = None,
    stride: options.Stride = None,
    json: options.Json = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    activations: options.Activations = "exact",
    revision: options.Revision = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Measure what quantizing cost: every model reads the same windows as BASE, token by token.

    Both perplexities and bits per byte, the change with its 95 % interval (over documents), how often
    both find the same token likeliest, the KL divergence, size and bits per weight. --revision is
    BASE's, --activations the others'.

    \b
    Examples:
      neoquant compare neoquant-demo neoquant-demo-nf4 --suite demo
      neoquant compare EleutherAI/gpt-neo-1.3B gpt-neo-1.3B-nf4 gpt-neo-1.3B-int8 --suite pile-core --json cost.json
      neoquant compare gpt-neo-1.3B-nf4 gpt-neo-1.3B-nf4 --activations int8 --suite pile-smoke
    """
    terminal: Terminal = ctx.obj
    check_writable(json)
    chosen = choose_suite(
        suite,
        base,
        data=data,
        subset=subset,
        documents=documents,
        protocol=protocol,
        context=context,
        stride=stride,
    )
    reference, tokenizer = load_contestant(base, terminal, "compare", revision=revision, device=device, dtype=dtype)
    others = []
    for model in models:
        other, own_tokenizer = load_contestant(
            model, terminal, "compare", revision=None, device=device, dtype=dtype, activations=activations
        )
        if own_tokenizer.sha256 != tokenizer.sha256:
            terminal.note(f"note: {model} comes with another tokenizer than {base}; both are read with that of {base}")
        others.append(other)

    from neoquant.evaluation import compare
    from neoquant.report.table import comparison_table

    result = compare(
        reference, others, tokenizer, chosen, exclude_calibrated=exclude_calibrated, progress=terminal.progress
    )
    evaluations = [result.reference, *(candidate.evaluation for candidate in result.candidates)]
    for note in dict.fromkeys(note for evaluation in evaluations for note in evaluation.notes):
        terminal.note(f"note: {note}")
    terminal.show(comparison_table(result))
    if json is not None:
        write_text(json, result.to_json() + "\n", terminal)
