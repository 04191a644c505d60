"""What calibration did to each kind of layer, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from neoquant.calibration.summary import Layers, by_projection
from neoquant.report.formatting import NONE, share


def calibration_table(layers: Layers, seconds: Mapping[str, float] | None = None) -> Table:
    """One line for each kind of layer: its output error by rounding to nearest and as it became, and the time."""
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("layer", no_wrap=True)
    for heading in ("n", "nearest %", "error %", "ratio", "worst"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("of", overflow="ellipsis", no_wrap=True)
    table.add_column("s", justify="right", no_wrap=True)
    for kind in by_projection(layers, seconds):
        table.add_row(
            Text(kind.name),
            str(kind.layers),
            share(kind.error_nearest),
            share(kind.error),
            f"{kind.ratio:.2f}",
            f"{kind.ratio_worst:.2f}",
            Text(kind.worst.removeprefix("transformer.").removesuffix(f".{kind.name}")),
            NONE if kind.seconds is None else f"{kind.seconds:.1f}",
        )
    return table
