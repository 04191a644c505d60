"""What calibration gained on each kind of layer, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from neoquant.calibration.summary import Layers, by_projection
from neoquant.report.formatting import NONE, share
from neoquant.report.split_table import Column, SplitTable

CALIBRATION_LEGEND = (
    "Error of each kind of layer's output on the calibration samples, % of the output's mean square, medians of n "
    "layers: by round-to-nearest (RTN), as quantized, and their ratio."
)


def calibration_table(layers: Layers, seconds: Mapping[str, float] | None = None) -> SplitTable:
    """One line for each kind of layer: its output error by round-to-nearest (RTN) and as quantized, and the time."""
    kinds = by_projection(layers, seconds)
    columns = [
        Column("n", [str(kind.layers) for kind in kinds]),
        Column("RTN %", [share(kind.error_nearest) for kind in kinds]),
        Column("error %", [share(kind.error) for kind in kinds]),
        Column("ratio", [f"{kind.ratio:.2f}" for kind in kinds]),
        Column("worst", [f"{kind.ratio_worst:.2f}" for kind in kinds]),
        Column("of", [kind.worst.removeprefix("transformer.").removesuffix(f".{kind.name}") for kind in kinds], "left"),
        Column("s", [NONE if kind.seconds is None else f"{kind.seconds:.1f}" for kind in kinds]),
    ]
    return SplitTable("layer", [kind.name for kind in kinds], columns)
