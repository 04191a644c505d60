"""`neoquant eval`: perplexity and bits per byte of one model."""

from __future__ import annotations

import typer

from neoquant.cli import options
from neoquant.cli.evaluation import choose_suite, load_contestant
from neoquant.cli.output import check_writable, write_text
from neoquant.cli.terminal import Terminal


def eval_(
    ctx: typer.Context,
    model: options.Model = None,
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
    """Measure a model on a suite: perplexity and bits per byte, for each subset and in total.

    What quantizing cost shows better, and with fewer documents, in `neoquant compare`.

    \b
    Examples:
      neoquant eval gpt-neo-1.3B-nf4 --suite pile-core --json nf4.json
      neoquant eval gpt-neo-1.3B-nf4 --suite pile-smoke --subset ArXiv --subset Github --documents 5
      neoquant eval gpt-neo-1.3B-nf4 --suite pile-core --data my-texts.jsonl --protocol strided --stride 512
    """
    terminal: Terminal = ctx.obj
    check_writable(json)
    chosen = choose_suite(
        suite,
        model,
        data=data,
        subset=subset,
        documents=documents,
        protocol=protocol,
        context=context,
        stride=stride,
    )
    contestant, tokenizer = load_contestant(
        model, terminal, "eval", revision=revision, device=device, dtype=dtype, activations=activations
    )

    from neoquant.evaluation import evaluate
    from neoquant.report.table import evaluation_table

    result = evaluate(
        contestant.model,
        tokenizer,
        chosen,
        describe=contestant.describe,
        calibrated_on=contestant.calibrated_on,
        exclude_calibrated=exclude_calibrated,
        progress=terminal.progress,
    )
    for note in result.notes:
        terminal.note(f"note: {note}")
    terminal.show(evaluation_table(result))
    if json is not None:
        write_text(json, result.to_json() + "\n", terminal)
