"""Grids: where the values of a quantized weight may lie.

    Grid            states its Decoding: how values follow from codes and parameters
    ├── Codebook    NF4 or FP4: 16 values times the absmax of a block, itself quantized or not (QLoRA, arXiv:2305.14314)
    ├── Int8Rows    256 even steps times the absmax of a row (LLM.int8(), arXiv:2208.07339)
    ├── TrellisGrid 2 or 3 bits, read down the rows: the last 12 say which of 16 or 32 values (QTIP, arXiv:2406.11235)
    ├── Mxfp4       four-bit floats times a power of two for 32 inputs of a row (OCP Microscaling Formats 1.0)
    └── Affine      2 to 8 bits: even steps of a group's scale around the group's zero

A grid is a plain value: two grids are equal if they say the same. A weight w[O, I] on a grid is `codes`, uint8[O, I],
and `params`, a few tensors by name whose shapes follow from the weight's. `nearest` of the first two gives
bitsandbytes' own bytes, which tests hold. Everything works in pieces of `CHUNK` weights, so it needs little beside the
weight and the codes; and a piece stays below what torch would split over its threads, whose meeting costs more than
the work where the processor is busy.

Each class and its tables live in a file of their own.
"""

from __future__ import annotations

from typing import Any

from neoquant.errors import RequestError
from neoquant.grids.affine import GROUP_SIZES, Affine
from neoquant.grids.base import Columns, Grid, Params, ParamShapes
from neoquant.grids.codebook import BLOCK_SIZES, FP4, NF4, Codebook, double_quant_table, load_bitsandbytes
from neoquant.grids.decoding import NESTED_GROUP, Decoding, Scale
from neoquant.grids.int8 import Int8Rows
from neoquant.grids.mxfp4 import Mxfp4
from neoquant.grids.trellis import TrellisGrid

GRIDS: dict[str, type[Grid]] = {
    "nf4": Codebook,
    "fp4": Codebook,
    "int8": Int8Rows,
    "affine": Affine,
    "mxfp4": Mxfp4,
    "trellis": TrellisGrid,
}

__all__ = [
    "BLOCK_SIZES",
    "FP4",
    "GRIDS",
    "GROUP_SIZES",
    "NESTED_GROUP",
    "NF4",
    "Affine",
    "Codebook",
    "Columns",
    "Decoding",
    "Grid",
    "Int8Rows",
    "ParamShapes",
    "Params",
    "Scale",
    "TrellisGrid",
    "double_quant_table",
    "grid_from_dict",
    "legal_pairs",
    "load_bitsandbytes",
    "make_grid",
    "option_names",
]


def legal_pairs() -> list[tuple[int, str]]:
    """Every (bits, type) that `make_grid` knows."""
    return [(bits, name) for name, cls in GRIDS.items() for bits in cls.legal_bits]


def option_names() -> tuple[str, ...]:
    """What may be chosen of any grid beside bits and type."""
    return tuple(dict.fromkeys(name for cls in GRIDS.values() for name in cls.options))


def make_grid(bits: int, type: str, **fields: int | bool | None) -> Grid:
    """The grid a user means; `fields` are among the grid's `options`, None for its own default.

    Raises RequestError naming what is legal.
    """
    if (bits, type) not in legal_pairs():
        legal = ", ".join(f"{b} {name}" for b, name in legal_pairs())
        raise RequestError(f"{bits} bits of type {type!r}: legal pairs of bits and type are {legal}")
    given: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
    cls = GRIDS[type]
    if foreign := [name for name in given if name not in cls.options]:
        has = f"its options are {' and '.join(cls.options)}" if cls.options else "it has no options"
        raise RequestError(f"{type} does not know {' and '.join(foreign)}; {has}")
    return grid_from_dict({"name": type, **({"bits": bits} if len(cls.legal_bits) > 1 else {}), **given})


def grid_from_dict(described: dict[str, Any]) -> Grid:
    """The inverse of `Grid.describe`. Raises RequestError for an unknown name or an illegal field."""
    fields = dict(described)
    name = fields.pop("name", None)
    if not isinstance(name, str) or name not in GRIDS:
        raise RequestError(f"no grid is called {name!r}; there are {', '.join(GRIDS)}")
    cls = GRIDS[name]
    try:
        return cls.from_fields(name, fields)
    except TypeError as error:
        raise RequestError(f"{name}: {', '.join(map(repr, fields))} are not its fields") from error
