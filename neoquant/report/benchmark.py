"""A speed measurement as a table for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from neoquant.benchmark.run import Speed
from neoquant.report.split_table import Column, SplitTable
from neoquant.sizes import plural, size


def speed_table(result: Speed) -> RenderableType:
    """One line a program: medians, and how many times faster neoquant is."""
    medians = [program.median for program in result.programs]
    ours = medians[0]
    columns = [
        Column("import s", [f"{m.import_s:.2f}" for m in medians]),
        Column("load s", [f"{m.load_s:.2f}" for m in medians]),
        Column("prefill tok/s", [f"{m.prefill_tokens_per_s:,.1f}" for m in medians]),
        Column("decode tok/s", [f"{m.decode_tokens_per_s:,.2f}" for m in medians]),
        Column("peak memory", [size(m.peak_bytes) for m in medians]),
        Column("prefill ×", ["", *(f"{ours.prefill_tokens_per_s / m.prefill_tokens_per_s:.2f}" for m in medians[1:])]),
        Column("decode ×", ["", *(f"{ours.decode_tokens_per_s / m.decode_tokens_per_s:.2f}" for m in medians[1:])]),
    ]
    legend = (
        f"{plural(result.prompt_tokens, 'prompt token')}, {plural(result.new_tokens, 'new token')}, "
        f"{f'{result.batch} sequences together, ' if result.batch > 1 else ''}"
        f"{f'keys and values in {result.cache}, ' if result.cache else ''}"
        f"{'CUDA graphs, ' if result.static_cache else ''}{f'on {result.device}, ' if result.device != 'cpu' else ''}"
        f"{plural(result.threads, 'thread')}; medians of {plural(result.repeats, 'run')} in turn, each in a process of "
        "its own · ×: neoquant is so many times as fast"
    )
    return Group(
        SplitTable("program", [program.label for program in result.programs], columns), Text(legend, style="dim")
    )
