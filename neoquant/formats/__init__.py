"""Formats by name. A new one is a file here, a line in this table and a section in docs/formats.md.

The order is that of preference: what other tools read comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from neoquant.errors import FormatError, RequestError
from neoquant.formats.base import Format
from neoquant.formats.bnb4 import Bnb4
from neoquant.formats.bnb8 import Bnb8
from neoquant.formats.compressed import CompressedTensors
from neoquant.formats.gptq import V1, V2, GptqFormat
from neoquant.formats.others import GIVE_THE_ORIGINAL, other_program
from neoquant.formats.packed import PackedFormat
from neoquant.grids import Grid

FORMATS: dict[str, Format] = {
    format.name: format for format in (Bnb4(), Bnb8(), GptqFormat(), CompressedTensors(), PackedFormat())
}

NAMED: Mapping[str, tuple[Format, ...]] = {
    "auto": tuple(FORMATS.values()),
    **{
        family: tuple(format for format in FORMATS.values() if format.family == family)
        for family in dict.fromkeys(format.family for format in FORMATS.values())
    },
    **{name: (format,) for name, format in FORMATS.items()},
    "gptq-v1": (GptqFormat(version=V1),),
    "gptq-v2": (GptqFormat(version=V2),),
}
"""What a format may be asked for by (a family's name, its own, or a version's) -> the formats to try, in this order."""

__all__ = [
    "FORMATS",
    "NAMED",
    "Bnb4",
    "Bnb8",
    "CompressedTensors",
    "Format",
    "GptqFormat",
    "PackedFormat",
    "choose",
    "detect",
    "detect_checked",
    "first_that_holds",
    "why_not",
]


def choose(
    layers: Mapping[str, tuple[Grid, tuple[int, ...]]],
    wanted: str = "auto",
    *,
    embeddings: bool = False,
    ordered: Collection[str] = (),
) -> Format:
    """The first format that holds all `layers` (name -> grid and shape) in one checkpoint.

    `embeddings` says that an embedding is among them; `ordered` are those with an activation order.
    `wanted` is a key of `NAMED`. Raises RequestError with every format's reason if there is none.
    """
    if wanted not in NAMED:
        raise RequestError(f"no format is called {wanted!r}; there are {', '.join(NAMED)}")
    format, reasons = first_that_holds(NAMED[wanted], layers, embeddings=embeddings, ordered=ordered)
    if format is None:
        raise RequestError(f"format {wanted!r} cannot hold this: {'; '.join(reasons)}")
    return format


def first_that_holds(
    candidates: Iterable[Format],
    layers: Mapping[str, tuple[Grid, tuple[int, ...]]],
    *,
    embeddings: bool = False,
    ordered: Collection[str] = (),
) -> tuple[Format | None, list[str]]:
    """The first candidate that holds what `choose` describes, None if none does; and why those before it do not."""
    reasons: list[str] = []
    for format in candidates:
        reason = why_not(format, layers, ordered)
        if reason is None and embeddings and not format.holds_embeddings:
            reason = f'format {format.name} keeps embeddings in half precision, format = "neoquant" can hold them'
        if reason is None:
            return format, reasons
        reasons.append(reason)
    return None, reasons


def detect(config: Mapping[str, Any], names: Iterable[str]) -> Format | None:
    """The format of a checkpoint with this config.json and these tensor names; None if nothing is quantized.

    Raises FormatError for a quantized checkpoint that no format here reads.
    """
    names = list(names)
    said = config.get("quantization_config") or {}
    if not isinstance(said, Mapping):
        raise FormatError(f"config.json says quantization_config = {said!r:.100}, expected an object")
    by_names = [format for format in FORMATS.values() if format.quantized(names)]
    if len(by_names) > 1:
        raise FormatError(f"tensors of several formats are mixed: {', '.join(format.name for format in by_names)}")
    method = said.get("quant_method") or (
        "bitsandbytes" if said.get("load_in_4bit") or said.get("load_in_8bit") else ""
    )
    if by_names and method not in by_names[0].other_methods:
        return by_names[0].configured(said)
    families = dict.fromkeys(format.family for format in FORMATS.values())
    if not method:
        if (what := other_program(names)) is None:
            return None
        raise FormatError(f"{what}; neoquant reads {', '.join(families)}: {GIVE_THE_ORIGINAL}")
    if not isinstance(method, str):
        raise FormatError(f"config.json says quant_method = {method!r:.100}, expected a string")
    if method in families:
        stored = f" of format {said['format']!r:.100}" if "format" in said else ""
        raise FormatError(
            f"config.json says {method}{stored}, but no tensor of the checkpoint is quantized as neoquant reads that: "
            f"{GIVE_THE_ORIGINAL}"
        )
    raise FormatError(
        f"config.json says quant_method {method!r:.100}; neoquant reads {', '.join(families)}: {GIVE_THE_ORIGINAL}"
    )


def detect_checked(
    config: Mapping[str, Any], names: Iterable[str], view: Callable[[str], Tensor]
) -> tuple[Format | None, tuple[str, ...]]:
    """`detect`, held against the tensors, which `view` gives by name; and notes where config.json contradicts them.

    Raises FormatError for a quantized checkpoint that no format here reads.
    """
    names = list(names)
    found = detect(config, names)
    return (None, ()) if found is None else found.checked(found.quantized(names), view)


def why_not(
    format: Format, layers: Mapping[str, tuple[Grid, tuple[int, ...]]], ordered: Collection[str] = ()
) -> str | None:
    """The first reason why `format` cannot hold all `layers`, those `ordered` with an activation order, or None."""
    for name, (grid, shape) in layers.items():
        reason = format.refuse(grid, shape) or (format.refuse_order() if name in ordered else None)
        if reason:
            return f"{reason} ({name})"
    return format.refuse_all({name: grid for name, (grid, _) in layers.items()})
