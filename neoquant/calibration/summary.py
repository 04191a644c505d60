"""What became of each layer that was rounded on calibration text, in figures: `calibration.json`, summed up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

Layers = Mapping[str, Mapping[str, Any]]
"""Layer -> its record, as `calibration.json` has it: `error`, `error_nearest`, `remarks` and the quantizer's own."""


@dataclass(frozen=True)
class Projection:
    """The layers of one kind (`q_proj`, ...) together.

    Errors are of what the layers give, mean squares relative to it; `ratio` is the error over that of rounding to
    nearest, and 1 says that nothing was gained. `seconds` is None where the time is not known.
    """

    name: str
    layers: int
    error_nearest: float  # median
    error: float  # median
    ratio: float  # median
    ratio_worst: float
    worst: str  # the layer that has it
    seconds: float | None


def by_projection(layers: Layers, seconds: Mapping[str, float] | None = None) -> list[Projection]:
    """A summary of each kind of layer, in the order in which they come. Records without both errors are passed over."""
    kinds: dict[str, dict[str, Mapping[str, Any]]] = {}
    for layer, record in layers.items():
        if isinstance(record.get("error"), float) and isinstance(record.get("error_nearest"), float):
            kinds.setdefault(layer.rpartition(".")[2], {})[layer] = record
    return [_projection(name, found, seconds or {}) for name, found in kinds.items()]


def remarks(layers: Layers) -> list[str]:
    """What was not as usual, one line a remark with the layers that it is true of."""
    found: dict[str, list[str]] = {}
    for layer, record in layers.items():
        for remark in record.get("remarks", ()):
            found.setdefault(str(remark), []).append(layer)
    return [f"{remark}: {listed(names)}" for remark, names in found.items()]


def listed(layers: Iterable[str]) -> str:
    """Names of layers, as short as they can be."""
    return ", ".join(layer.removeprefix("transformer.") for layer in layers)


def _projection(name: str, layers: Layers, seconds: Mapping[str, float]) -> Projection:
    ratios = {layer: _ratio(record) for layer, record in layers.items()}
    worst = max(ratios, key=lambda layer: ratios[layer])
    timed = [seconds[layer] for layer in layers if layer in seconds]
    return Projection(
        name=name,
        layers=len(layers),
        error_nearest=median(record["error_nearest"] for record in layers.values()),
        error=median(record["error"] for record in layers.values()),
        ratio=median(ratios.values()),
        ratio_worst=ratios[worst],
        worst=worst,
        seconds=sum(timed) if timed else None,
    )


def _ratio(record: Mapping[str, Any]) -> float:
    """Of a layer that nearest rounding does not change, 1."""
    return float(record["error"] / record["error_nearest"]) if record["error_nearest"] else 1.0
