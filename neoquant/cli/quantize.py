"""`neoquant quantize`: make a quantized checkpoint folder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neoquant.cli import options
from neoquant.cli.models import find_model, short_name, suite_for
from neoquant.cli.plan import show_plan
from neoquant.cli.processes import own_device, process_group_of
from neoquant.cli.recipes import RecipeOptions, choose_recipe, refuse_idle_options
from neoquant.cli.samples import read_samples
from neoquant.cli.terminal import Terminal
from neoquant.cli.to_order import SizeTarget, recipe_to_order
from neoquant.demo import NAME as BUNDLED
from neoquant.errors import RequestError
from neoquant.report.formatting import duration
from neoquant.sizes import parse_size, size

if TYPE_CHECKING:
    from neoquant.distributed import ProcessGroup
    from neoquant.quantization.quantize import QuantizeResult


def quantize(
    ctx: typer.Context,
    model: options.Model = None,
    bits: options.Bits = None,
    type: options.Type = None,
    block_size: options.BlockSize = None,
    no_double_quant: options.NoDoubleQuant = False,
    group_size: options.GroupSize = None,
    symmetric: options.Symmetric = False,
    float_zero: options.FloatZero = False,
    quantizer: options.Quantizer = None,
    order: options.Order = None,
    scales: options.Scales = None,
    damping: options.Damping = None,
    objective: options.Objective = None,
    correction: options.Correction = None,
    quantizer_option: options.QuantizerOption = None,
    target_bits: options.TargetBits = None,
    target_size: options.TargetSize = None,
    calibration: options.Calibration = None,
    rows: options.Rows = None,
    length: options.Length = None,
    seed: options.Seed = None,
    max_memory: options.MaxMemory = None,
    device: options.CalibrationDevice = "cpu",
    keep: options.Keep = None,
    recipe: options.RecipeName = None,
    format: options.Format = None,
    dtype: options.KeptDtype = None,
    embeddings: options.Embeddings = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Output folder. [default: MODEL-RECIPE, here]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing folder.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard an interrupted calibrated run and start again.")
    ] = False,
    shard_size: options.ShardSize = "5GB",
    revision: options.Revision = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan, as `neoquant plan` does.")] = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Quantize a model into a new folder, tensor by tensor: by round-to-nearest (RTN), HQQ or GPTQ.

    The folder is a bitsandbytes checkpoint wherever that format can hold the recipe: transformers loads it,
    and so does neoquant. Tokenizer, licence and a model card are written with it. The write is atomic: the
    folder appears when it is complete. An interrupted run with --calibration resumes after its last finished
    block when the same command is given again, with the same result. Under torchrun the processes share the
    calibration samples; with --device cuda each takes a GPU.

    \b
    Examples:
      neoquant quantize --bits 4 --type nf4                  the bundled model, to try things
      neoquant quantize EleutherAI/gpt-neo-1.3B --bits 4 --type nf4
      neoquant quantize EleutherAI/gpt-neo-1.3B --bits 8 --type int8 --out neo-int8
      neoquant quantize my-finetune --bits 4 --type fp4 --block-size 128 --keep 'transformer.h.0.*'
      neoquant quantize my-finetune --bits 3 --type gptq --group-size 64 --calibration my-text.jsonl
      neoquant quantize my-finetune --bits 4 --type nf4 --calibration pile
      neoquant quantize my-finetune --target-bits 3.2 --calibration my-text.jsonl
      neoquant quantize my-finetune --recipe my-recipe.toml --dry-run
      torchrun --nproc-per-node 4 -m neoquant quantize my-finetune --bits 4 --type nf4 --calibration pile --device cuda
    """
    from neoquant.calibration.dataset import ROWS
    from neoquant.quantization import quantize as quantization

    terminal: Terminal = ctx.obj
    asked = RecipeOptions.of(ctx.params)
    target = SizeTarget.of(target_bits, target_size, device, asked)
    chosen = None if target is not None else choose_recipe(asked)
    if chosen is not None:
        refuse_idle_options(ctx.params, chosen)
    rows = ROWS if rows is None else rows
    largest = parse_size(shard_size, "--shard-size")
    limit = None if max_memory is None else parse_size(max_memory, "--max-memory")
    with process_group_of(terminal, device) as group:
        device = own_device(device, group)
        _refuse_shared(target, group)
        source = find_model(model, terminal, "quantize")
        samples = None
        if not dry_run or target is not None:
            samples = read_samples(source, revision, calibration, rows, length, seed or 0, terminal)
        if chosen is None:
            assert target is not None and samples is not None
            chosen = recipe_to_order(source, revision, target, samples, asked, limit, terminal)
        folder = out or Path(f"{short_name(model)}-{chosen.name}")
        common: dict[str, Any] = {
            "revision": revision,
            "shard_size": largest,
            "max_memory": limit,
            "device": device,
            "progress": terminal.progress,
        }
        if dry_run:
            planned = quantization.plan(
                source,
                chosen,
                name=folder.name,
                calibration_rows=rows,
                calibration_length=length,
                processes=group.size,
                **common,
            )
            if not group.rank:
                show_plan(planned, terminal)
                terminal.show(f"a dry run: {folder} was not written")
            return
        made = quantization.quantize(
            source, folder, chosen, force=force, calibration=samples, restart=restart, process_group=group, **common
        )
        if not group.rank:
            _show_result(made, folder, model, terminal)


def _refuse_shared(target: SizeTarget | None, group: ProcessGroup) -> None:
    """Raise RequestError for what several processes cannot share."""
    if target is not None and group.size > 1:
        raise RequestError("--target-bits and --target-size run in one process: start it without torchrun")


def _show_result(made: QuantizeResult, folder: Path, model: str | None, terminal: Terminal) -> None:
    """Print notes, sizes, the errors of calibrated layers, time, memory, and how to measure the accuracy loss."""
    for note in made.plan.notes:
        terminal.note(f"note: {note}")
    terminal.show(
        f"{folder}: {size(made.plan.source_bytes)} -> {size(made.plan.weights_bytes)}, "
        f"{made.plan.bits_per_weight_linears:.3f} bits per weight of the linear layers, "
        f"{made.plan.bits_per_weight_model:.3f} of the whole model, format {made.plan.format.label}"
    )
    if made.layers:
        from neoquant.calibration.summary import remarks
        from neoquant.report.calibration import CALIBRATION_LEGEND, calibration_table

        terminal.show(CALIBRATION_LEGEND, calibration_table(made.layers, made.layer_seconds))
        for remark in remarks(made.layers):
            terminal.note(f"note: {remark}")
    measure = shlex.join(["neoquant", "compare", model or BUNDLED, str(folder), "--suite", suite_for(model)])
    terminal.note(
        f"took {duration(made.seconds)} and {size(made.peak_rss_bytes)} of memory; measure the accuracy loss: {measure}"
    )
