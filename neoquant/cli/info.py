"""`neoquant info`: what a model is, or what this machine has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neoquant.cli import options
from neoquant.cli.generation import cache_memory
from neoquant.cli.models import find_model, shown_name
from neoquant.cli.terminal import Terminal
from neoquant.errors import RequestError
from neoquant.sizes import plural, size

if TYPE_CHECKING:
    from neoquant.checkpoint import Checkpoint
    from neoquant.cli.describe import Description


def info(
    ctx: typer.Context,
    model: options.Model = None,
    env: Annotated[
        bool,
        typer.Option("--env", help="Describe this machine instead: versions, CPU features, kernels."),
    ] = False,
    context: options.SequenceLength = None,
    batch: options.Batch = 1,
    revision: options.Revision = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Describe a model: its shape, size, grids, bits per weight, which programs read it, and what keys and values take
    while it generates. Reads no weights.

    \b
    Examples:
      neoquant info gpt-neo-1.3B-nf4
      neoquant info EleutherAI/gpt-neo-2.7B
      neoquant info --env
    """
    terminal: Terminal = ctx.obj
    if env:
        if model is not None:
            raise RequestError(f"--env is about this machine: leave out {model}, or --env")
        from neoquant.cli import environment

        terminal.show_facts(environment.facts())
        return

    from neoquant.checkpoint import open_checkpoint
    from neoquant.cli.describe import calibration_record, describe

    source = find_model(model, terminal, "info")
    with open_checkpoint(source, revision=revision, headers_only=True, progress=terminal.progress) as checkpoint:
        found = describe(checkpoint)
        held = ("KV cache", cache_memory(found.config, context, batch))
        terminal.show_facts([*_facts(checkpoint, found), held, *(("note", note) for note in checkpoint.notes)])
        layers = calibration_record(checkpoint).get("layers")
    if isinstance(layers, dict) and layers:
        from neoquant.calibration.summary import remarks
        from neoquant.report.calibration import CALIBRATION_LEGEND, calibration_table

        terminal.show(CALIBRATION_LEGEND, calibration_table(layers), *remarks(layers))


def _facts(checkpoint: Checkpoint, found: Description) -> list[tuple[str, str]]:
    from neoquant.quantization.model_card import LIBRARIES

    config, record = found.config, found.record
    local = sum(kind == "local" for kind in config.attention_layers)
    facts = [
        ("model", f"{shown_name(checkpoint.source)}{f' at {checkpoint.revision}' if checkpoint.revision else ''}"),
        ("layers", f"{config.num_layers}, {local} with local attention of window {config.window_size}"),
        ("width", f"{config.hidden_size}, {plural(config.num_heads, 'head')}, MLP {config.inner_size}"),
        ("context", f"{plural(config.max_position_embeddings, 'token')}, vocabulary {config.vocab_size:,}"),
        ("parameters", f"{found.parameters:,}"),
        ("size", f"{size(found.bytes)} in {plural(len(checkpoint.headers), 'tensor')}"),
        (
            "bits",
            f"{found.bits_per_weight_linears:.3f} per weight of the linear layers, "
            f"{found.bits_per_weight_model:.3f} per parameter of the model",
        ),
    ]
    if found.format is None:
        types = sorted({str(header.dtype).removeprefix("torch.") for header in checkpoint.headers.values()})
        return [*facts, ("format", f"not quantized, {', '.join(types)}"), ("read by", "neoquant and transformers")]
    facts += [("format", found.format.label), ("grids", found.grids)]
    if record:
        made_from, recipe, by = record.get("source"), record.get("recipe", {}).get("name"), record.get("neoquant")
        before = record.get("converted_from", {}).get("format")
        how = f"converted from {made_from}, format {before}" if before else f"from {made_from} with the recipe {recipe}"
        facts.append(("made by", f"neoquant {by} {how}"))
    if tuned := _tuning(record):
        facts.append(("tuned", tuned))
    library = LIBRARIES.get(found.format.family)
    others = f" and transformers with {library}" if library else " only"
    return [*facts, ("read by", f"neoquant{others}")]


def _tuning(record: Mapping[str, Any]) -> str | None:
    """What was trained after quantizing, as the record says; None where nothing was."""
    from neoquant.quantization.model_card import tuning_facts

    tuned = record.get("tuned")
    if tuned is None:
        return None
    try:
        return tuning_facts(tuned)
    except (KeyError, TypeError, ValueError, AttributeError):
        return "not stated: the record is damaged"
