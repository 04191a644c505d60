"""`neoquant tune`: train what a quantized model holds in floating point."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from neoquant.cli import options
from neoquant.cli.models import find_model, short_name, suite_for
from neoquant.cli.output import check_output_file, json_kind, write_text
from neoquant.cli.samples import read_samples
from neoquant.cli.terminal import Terminal
from neoquant.demo import resolve
from neoquant.report.formatting import duration
from neoquant.sizes import parse_size, plural, size

if TYPE_CHECKING:
    from neoquant.tuning.tune import TuneResult


def tune(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A quantized folder, or a hub id.", show_default=False)],
    base: Annotated[
        str,
        typer.Option(
            "--base",
            metavar="MODEL",
            help="The model that it was quantized from, in full or half precision: its predictions are aimed at.",
            show_default=False,
        ),
    ],
    calibration: Annotated[
        str,
        typer.Option(
            "--calibration",
            metavar="TEXT",
            help="Train on samples of this text: pile, demo, a suite's name, or a file.",
            show_default=False,
        ),
    ],
    rows: options.Rows = None,
    length: options.Length = None,
    seed: options.Seed = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", metavar="N", help="Of Adam, each on about 2,048 tokens. [default: each sample twice]", min=1
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", metavar="X", help="At its highest. [default: 0.001]"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Output folder. [default: MODEL-tuned, here]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing folder.")] = False,
    shard_size: options.ShardSize = "5GB",
    revision: options.Revision = None,
    base_revision: Annotated[
        str | None,
        typer.Option(
            "--base-revision", metavar="NAME", help="Branch, tag or commit of --base on the hub.", show_default=False
        ),
    ] = None,
    json_file: options.Json = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Train scales, biases and norms of a quantized model against the predictions of its original, into a new folder.

    Codes, format and size stay as they are: whatever reads MODEL reads the result. An eighth of the samples is held
    out; where the loss on it does not fall, the result is MODEL as it came. The text becomes training text, and
    evaluation warns of it. Computed on the CPU in float32, both models in memory.

    \b
    Examples:
      neoquant tune gpt-neo-125m-gptq3 --base EleutherAI/gpt-neo-125m --calibration pile
      neoquant tune neoquant-demo-nf4 --base neoquant-demo --calibration demo --rows 256 --steps 192
    """
    from neoquant.calibration.dataset import ROWS
    from neoquant.tuning.tune import LEARNING_RATE
    from neoquant.tuning.tune import tune as tune_checkpoint

    terminal: Terminal = ctx.obj
    check_output_file(json_file, json_kind("tuning"), terminal, inputs=[model, base], force=force)
    largest = parse_size(shard_size, "--shard-size")
    source = find_model(model, terminal, "tune")
    folder = out or Path(f"{short_name(model)}-tuned")
    samples = read_samples(source, revision, calibration, ROWS if rows is None else rows, length, seed or 0, terminal)
    assert samples is not None  # the option is required
    made = tune_checkpoint(
        source,
        folder,
        base=resolve(base),
        calibration=samples,
        steps=steps,
        learning_rate=LEARNING_RATE if learning_rate is None else learning_rate,
        revision=revision,
        base_revision=base_revision,
        force=force,
        shard_size=largest,
        progress=terminal.progress,
    )
    if json_file is not None:
        written = {"schema_version": "neoquant.tuning/1", **made.to_dict()}
        write_text(json_file, json.dumps(written, indent=1) + "\n", terminal)
    _show_result(made, folder, base, terminal)


def _show_result(made: TuneResult, folder: Path, base: str, terminal: Terminal) -> None:
    """Print notes, what was trained, the losses, time and memory, and how to measure what came of it."""
    for note in made.notes:
        terminal.note(f"note: {note}")
    trained = ", ".join(f"{count:,} {kind}" for kind, count in made.trained.items() if count)
    loss = f"KL divergence from {made.base} on {plural(made.held, 'sample')} held out {made.before:.4g}"
    if made.changed:
        terminal.show(
            f"{folder}: {trained} trained by {plural(made.schedule.steps, 'step')}; {loss} -> {made.after:.4g} nats a "
            f"token, {made.after / made.before:.3f} of it"
        )
    else:
        terminal.show(
            f"{folder}: {loss}, and {made.after:.4g} nats a token after {plural(made.schedule.steps, 'step')}: it did "
            "not fall, so the weights are as they came"
        )
    measure = shlex.join(["neoquant", "compare", base, str(folder), "--suite", suite_for(base)])
    terminal.note(
        f"took {duration(made.seconds)} and {size(made.peak_rss_bytes)} of memory; measure the accuracy loss: {measure}"
    )
