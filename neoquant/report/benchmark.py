"""A speed measurement as a table for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from neoquant.benchmark.run import Speed


def speed_table(result: Speed) -> RenderableType:
    """One line a program: medians, and how many times faster neoquant is."""
    table = Table("", box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("import s", "load s", "prefill tok/s", "decode tok/s", "peak MB", "prefill ×", "decode ×"):
        table.add_column(heading, justify="right", no_wrap=True)
    ours = result.programs[0].median
    for program in result.programs:
        found = program.median
        first = found is ours
        table.add_row(
            Text(program.label),
            f"{found.import_s:.2f}",
            f"{found.load_s:.2f}",
            f"{found.prefill_tokens_per_s:,.1f}",
            f"{found.decode_tokens_per_s:,.2f}",
            f"{found.peak_rss_bytes / 1e6:,.0f}",
            "" if first else f"{ours.prefill_tokens_per_s / found.prefill_tokens_per_s:.2f}",
            "" if first else f"{ours.decode_tokens_per_s / found.decode_tokens_per_s:.2f}",
        )
    legend = (
        f"{result.prompt_tokens} tokens of prompt, {result.new_tokens} new ones, {result.threads} threads; medians of "
        f"{result.repeats}, in turn, each in a process of its own · ×: neoquant is so many times as fast"
    )
    return Group(table, Text(legend, style="dim"))
