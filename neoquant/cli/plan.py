"""`neoquant plan`: what quantizing would do, from the headers alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict
from json import dumps
from typing import TYPE_CHECKING, NamedTuple

import typer

from neoquant.cli import options
from neoquant.cli.generation import cache_memory
from neoquant.cli.models import find_model, shown_name
from neoquant.cli.output import check_output_file, json_kind, write_text
from neoquant.cli.recipes import RecipeOptions, choose_recipe, refuse_idle_options
from neoquant.cli.terminal import Terminal
from neoquant.report.formatting import duration, grid_label
from neoquant.sizes import parse_size, plural, size

if TYPE_CHECKING:
    from neoquant.quantization.plan import Plan, PlanRow
    from neoquant.report.split_table import SplitTable


def plan(
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
    keep: options.Keep = None,
    recipe: options.RecipeName = None,
    format: options.Format = None,
    dtype: options.KeptDtype = None,
    embeddings: options.Embeddings = None,
    calibration: options.Calibration = None,
    rows: options.Rows = None,
    length: options.Length = None,
    max_memory: options.MaxMemory = None,
    device: options.CalibrationDevice = "cpu",
    shard_size: options.ShardSize = "5GB",
    context: options.SequenceLength = None,
    batch: options.Batch = 1,
    revision: options.Revision = None,
    json: options.Json = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Show what quantizing would do: how each tensor is stored, sizes, memory. Reads no weights.

    Of a model on the hub only the headers are downloaded, some kilobytes. With --calibration, whose text is not read,
    the time is estimated from the speed of this machine's CPU, or of --device.

    \b
    Examples:
      neoquant plan EleutherAI/gpt-neo-1.3B --bits 4 --type nf4
      neoquant plan EleutherAI/gpt-neo-2.7B --bits 8 --type int8 --keep '*.c_proj'
      neoquant plan my-finetune --recipe my-recipe.toml --json plan.json
    """
    from neoquant.calibration.dataset import ROWS
    from neoquant.model.config import GPTNeoConfig
    from neoquant.quantization import quantize as quantization

    terminal: Terminal = ctx.obj
    chosen = choose_recipe(RecipeOptions.of(ctx.params))
    refuse_idle_options(ctx.params, chosen)
    check_output_file(json, json_kind("plan"), terminal, inputs=[model, recipe], force=force)
    source = find_model(model, terminal, "plan")
    made = quantization.plan(
        source,
        chosen,
        revision=revision,
        shard_size=parse_size(shard_size, "--shard-size"),
        calibration_rows=ROWS if rows is None else rows,
        calibration_length=length,
        max_memory=None if max_memory is None else parse_size(max_memory, "--max-memory"),
        device=device,
        progress=terminal.progress,
    )
    held = cache_memory(GPTNeoConfig.from_dict(dict(made.config)), context, batch)
    if json is not None:
        calibrating = {} if made.calibrating is None else {"calibrating": asdict(made.calibrating)}
        written = {"schema_version": "neoquant.plan/1", **made.to_dict(), **calibrating}
        write_text(json, dumps(written, indent=2) + "\n", terminal)
    show_plan(made, terminal, held)


def show_plan(plan: Plan, terminal: Terminal, held: str | None = None) -> None:
    """Print a plan: the table of tensors, then the totals, the KV cache (`held`), and the notes."""
    at = f" at {plan.revision[:12]}" if plan.revision else ""
    terminal.show(
        f"{shown_name(plan.source)}{at}, recipe {plan.recipe.name}, format {plan.format.label}", plan_table(plan)
    )
    before, after = plan.source_bytes, plan.weights_bytes
    terminal.show_facts(
        [
            *(
                ("grid", grid_label(grid))
                for grid in dict.fromkeys(row.grid for row in plan.rows if row.grid is not None)
            ),
            ("weights", f"{size(before)} -> {size(after)}, {before / after:.2f} times smaller"),
            ("on disk", f"{size(plan.output_bytes)}, the whole folder"),
            (
                "bits",
                f"{plan.bits_per_weight_linears:.3f} per weight of the linear layers, "
                f"{plan.bits_per_weight_model:.3f} per parameter of the model",
            ),
            ("memory", f"about {size(plan.peak_memory_bytes)} at the peak{_of_each(plan)}"),
            *_calibrating_facts(plan),
            *([] if held is None else [("KV cache", held)]),
            *(("note", note) for note in plan.notes),
        ]
    )


def _of_each(plan: Plan) -> str:
    return " of each process" if plan.calibrating is not None and plan.calibrating.processes > 1 else ""


def _calibrating_facts(plan: Plan) -> Iterator[tuple[str, str]]:
    if plan.calibrating is None:
        return
    from neoquant.calibration.memory import guess_search_seconds, guess_seconds
    from neoquant.model.config import GPTNeoConfig

    need = plan.calibrating
    config = GPTNeoConfig.from_dict(dict(plan.config))
    guessed = guess_seconds(config, need.rows, need.length, need.methods, need.device, need.processes)
    chained = (row.source for row in plan.rows if row.grid is not None and row.grid.decoding.trellis is not None)
    guessed += guess_search_seconds(sum(math.prod(source.shape) for source in chained), need.methods)
    where = "this machine's CPU" if need.device == "cpu" else need.device
    samples = f"{plural(need.rows, 'sample')} of {plural(need.length, 'token')}"
    if need.processes > 1:
        samples += f", shared by {need.processes} processes"
    yield "calibration", f"{samples}{', their hidden states in files' * need.spilled}"
    yield (
        "time",
        f"about {duration(guessed)} on {where} (an estimate), "
        f"with {size(need.disk)} of temporary files{_of_each(plan)}",
    )


_ORDER = ("quantize", "keep", "copy", "drop")


class _Group(NamedTuple):
    """Tensors of one kind that are treated alike."""

    what: str
    shape: str
    becomes: str
    why: str


def plan_table(plan: Plan) -> SplitTable:
    """One line for each group of tensors that are treated alike."""
    from neoquant.report.split_table import Column, SplitTable

    grids = {row.grid for row in plan.rows if row.grid is not None}
    briefly = len({grid.name for grid in grids}) == len(grids)  # the name alone says which grid it is
    groups: dict[_Group, list[PlanRow]] = {}
    for row in sorted(plan.rows, key=lambda row: _ORDER.index(row.action)):
        groups.setdefault(_group(row, briefly), []).append(row)
    stored = [sum(row.out_bytes for row in rows) for rows in groups.values()]
    weights = [max(1, sum(row.source.numel for row in rows)) for rows in groups.values()]
    columns = [
        Column("n", [str(len(rows)) for rows in groups.values()]),
        Column("shape", [group.shape for group in groups]),
        Column("becomes", [group.becomes for group in groups], "left"),
        Column("bits", [f"{8 * count / numel:.3f}" for count, numel in zip(stored, weights, strict=True)]),
        Column("size", [size(count) for count in stored]),
        Column("why", [group.why for group in groups], "left", wraps=True),
    ]
    styles = ["" if rows[0].action == "quantize" else "dim" for rows in groups.values()]
    return SplitTable("layer", [group.what for group in groups], columns, styles=styles)


def _group(row: PlanRow, briefly: bool) -> _Group:
    stored = str(row.stored[0].dtype).removeprefix("torch.") if row.stored else "-"
    if row.action == "copy":
        return _Group("biases and norms", "", stored, "")
    what = re.sub(r"\bh\.\d+\.", "h.*.", row.layer.removeprefix("transformer."))
    shape = "x".join(map(str, row.shape))
    if row.grid is None:
        return _Group(what, shape, stored, row.reason)
    return _Group(what, shape, row.grid.name if briefly else grid_label(row.grid), "")
