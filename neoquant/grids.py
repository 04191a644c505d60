"""Grids: where the values of a quantized weight may lie.

    Grid
    ├── Codebook    NF4 or FP4: 16 values times the absmax of a block, itself quantized or not (QLoRA, arXiv:2305.14314)
    └── Int8Rows    256 even steps times the absmax of a row (LLM.int8(), arXiv:2208.07339)

A grid is a plain value: two grids are equal if they say the same. A weight w[O, I] on a grid is `codes`, uint8[O, I],
and `params`, a few tensors by name whose shapes follow from the weight's. `nearest` gives bitsandbytes' own bytes,
which tests hold, and is the native library's work where that does not refuse. Everything works in pieces of `CHUNK`
weights, so it needs little beside the weight and the codes; and a piece stays below what torch would split over its
threads, whose meeting costs more than the work where the processor is busy.

The NF4 and FP4 tables, and the table of double quantization, live here and nowhere else.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from neoquant.errors import FormatError, RequestError
from neoquant.native import rounding

Params = dict[str, Tensor]
ParamShapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256  # how many absmax share a scale under double quantization
CHUNK = 7 * 4096  # weights handled at once: whole blocks of every size, in cache, and below what torch gives to threads
TO_INTEGER = 1.5 * 2**23  # added and taken away, leaves the nearest integer (ties to even); torch.round starts threads
CELLS = 1024  # cells between 0 and 1 when the nearest value is looked up
SMALLEST_SCALE = 1e-38  # what bitsandbytes divides by where a block is all zero

# QLoRA, appendix E: quantiles of the normal distribution, with an exact zero, scaled to [-1, 1].
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# A sign and three bits; the code is the bit pattern, so the values are not sorted, and zero has two codes.
_FP4_HALF = tuple(value / 12 for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
FP4 = (*_FP4_HALF, *(0.0 - value for value in _FP4_HALF))


class Grid(ABC):
    """Where values may lie. Subclasses are frozen dataclasses."""

    bits: ClassVar[int]

    @property
    @abstractmethod
    def name(self) -> str:
        """What a user calls it: a key of `GRIDS`."""

    @abstractmethod
    def param_shapes(self, shape: tuple[int, ...]) -> ParamShapes:
        """Name -> (dtype, shape) of the parameters of a weight [O, I]."""

    @abstractmethod
    def nearest(self, w: Tensor) -> tuple[Tensor, Params]:
        """Round w[O, I] to the nearest values as bitsandbytes does, to the byte: (codes uint8[O, I], params).

        Raises FormatError for a weight that holds infinity or NaN.
        """

    @abstractmethod
    def fit(self, w: Tensor) -> Params:
        """Parameters for w[O, I], already rounded to the type they are stored in."""

    @abstractmethod
    def round(self, w: Tensor, params: Params) -> Tensor:
        """The codes, uint8[O, I], whose values under `params` are nearest to w[O, I]."""

    @abstractmethod
    def decode(self, codes: Tensor, params: Params, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values of `codes`, uint8[O, I]: computed in float32, given as dtype[O, I]."""

    def check(self, params: Params, shape: tuple[int, ...]) -> None:
        """Raise FormatError unless `params` are what a weight of `shape` has."""
        expected = self.param_shapes(shape)
        if params.keys() != expected.keys():
            raise FormatError(f"{self.name} has the parameters {sorted(expected)}, got {sorted(params)}")
        for name, (dtype, size) in expected.items():
            found = params[name]
            if found.dtype != dtype or tuple(found.shape) != size:
                raise FormatError(
                    f"{name} of a {self.name} weight {list(shape)} is {dtype} {list(size)}, "
                    f"got {found.dtype} {list(found.shape)}"
                )
            if dtype.is_floating_point and not found.isfinite().all():
                raise FormatError(f"{name} of a {self.name} weight holds infinity or NaN")

    def describe(self) -> dict[str, Any]:
        """The grid as a JSON object, for headers and records."""
        fields: dict[str, Any] = asdict(self)  # type: ignore[call-overload]  # every concrete grid is a dataclass
        fields.pop("kind", None)
        return {"name": self.name, **fields}

    @staticmethod
    def from_dict(described: dict[str, Any]) -> Grid:
        """The inverse of `describe`. Raises RequestError for an unknown name or an illegal field."""
        fields = dict(described)
        name = fields.pop("name", None)
        if not isinstance(name, str) or name not in GRIDS:
            raise RequestError(f"no grid is called {name!r}; there are {', '.join(GRIDS)}")
        cls = GRIDS[name]
        try:
            return cls(kind=name, **fields) if cls is Codebook else cls(**fields)
        except TypeError as error:
            raise RequestError(f"{name}: {', '.join(map(repr, fields))} are not its fields") from error


@dataclass(frozen=True)
class Codebook(Grid):
    """Sixteen values times the absmax of a block. Blocks run over the flattened weight and may cross rows.

    Without double quantization: `absmax` float32[blocks]. With it, the absmax less their mean are themselves
    8-bit: `absmax` uint8[blocks], `nested_absmax` float32[ceil(blocks / 256)], `nested_offset` float32[] (the mean).
    """

    kind: str = "nf4"
    block_size: int = 64
    double_quant: bool = True

    bits: ClassVar[int] = 4

    def __post_init__(self) -> None:
        if self.kind not in ("nf4", "fp4"):
            raise RequestError(f"no codebook is called {self.kind!r}; there are nf4 and fp4")
        if not isinstance(self.block_size, int) or self.block_size not in BLOCK_SIZES:
            raise RequestError(f"block size {self.block_size!r}: legal are {', '.join(map(str, BLOCK_SIZES))}")
        if not isinstance(self.double_quant, bool):
            raise RequestError(f"double_quant is true or false, got {self.double_quant!r}")

    @property
    def name(self) -> str:
        return self.kind

    @property
    def zero_code(self) -> int:
        """The code that a zero is rounded to."""
        return {"nf4": 7, "fp4": 0}[self.kind]

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """The sixteen values by code, float32[16]."""
        return codebook_table(self.kind, torch.device(device))

    def param_shapes(self, shape: tuple[int, ...]) -> ParamShapes:
        blocks = _pieces(shape[0] * shape[1], self.block_size)
        if not self.double_quant:
            return {"absmax": (torch.float32, (blocks,))}
        return {
            "absmax": (torch.uint8, (blocks,)),
            "nested_absmax": (torch.float32, (_pieces(blocks, NESTED_BLOCK_SIZE),)),
            "nested_offset": (torch.float32, ()),
        }

    def nearest(self, w: Tensor) -> tuple[Tensor, Params]:
        if rounding.refuse(w) is None:
            flat = w.detach().reshape(-1)
            codes, absmax = rounding.round_blocks(flat, self.block_size, *_midpoints(self.kind))
            _require_finite(absmax)
            return codes.view(w.shape), self._store(absmax)
        absmax = self._absmax(w)
        return self._codes(w, absmax), self._store(absmax)

    def fit(self, w: Tensor) -> Params:
        return self._store(self._absmax(w))

    def round(self, w: Tensor, params: Params) -> Tensor:
        return self._codes(w, self.scales(params))

    def decode(self, codes: Tensor, params: Params, dtype: torch.dtype = torch.float32) -> Tensor:
        flat = codes.reshape(-1)
        out = torch.empty(flat.numel(), dtype=dtype, device=codes.device)
        absmax, table = self.scales(params), self.table(codes.device)
        for span, blocks in self._spans(flat.numel()):
            values = table.index_select(0, flat[span].int())
            whole, rest = self._split(values)
            whole.mul_(absmax[blocks][: len(whole), None])
            rest.mul_(absmax[blocks][-1])
            out[span] = values
        return out.view(codes.shape)

    def scales(self, params: Params) -> Tensor:
        """The absmax of every block as float32[blocks], double quantization undone."""
        if not self.double_quant:
            return params["absmax"]
        coarse = params["nested_absmax"].repeat_interleave(NESTED_BLOCK_SIZE)[: params["absmax"].numel()]
        table = double_quant_table(params["absmax"].device)
        return table.index_select(0, params["absmax"].int()).mul_(coarse).add_(params["nested_offset"])

    def _absmax(self, w: Tensor) -> Tensor:
        """The largest magnitude of every block, float32[blocks]."""
        flat = w.detach().reshape(-1)
        absmax = torch.empty(_pieces(flat.numel(), self.block_size), dtype=torch.float32, device=w.device)
        for span, blocks in self._spans(flat.numel()):
            whole, rest = self._split(flat[span].abs())
            absmax[blocks][: len(whole)] = whole.amax(1)
            if len(rest):  # bitsandbytes gives an all-zero short block this absmax
                absmax[blocks][-1] = rest.amax().float().clamp(min=SMALLEST_SCALE)
        _require_finite(absmax)
        return absmax

    def _codes(self, w: Tensor, absmax: Tensor) -> Tensor:
        """The code of the value nearest to each weight, uint8[O, I]."""
        flat = w.detach().reshape(-1)
        codes = torch.empty(flat.numel(), dtype=torch.uint8, device=w.device)
        absmax = absmax.clamp(min=SMALLEST_SCALE)
        bound, below, above = _cells(self.kind, w.device)
        for span, blocks in self._spans(flat.numel()):
            whole, rest = self._split(flat[span].float())
            # bitsandbytes multiplies whole blocks by the reciprocal and divides a short one: ties depend on it
            scaled = (whole * (1 / absmax[blocks][: len(whole), None])).view(-1)
            if len(rest):
                scaled = torch.cat([scaled, rest / absmax[blocks][-1]])
            scaled.clamp_(-1, 1)
            cell = scaled.mul(CELLS).add_(CELLS).int()
            higher = scaled > bound.index_select(0, cell)
            torch.where(higher, above.index_select(0, cell), below.index_select(0, cell), out=codes[span])
        return codes.view(w.shape)

    def _split(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """The whole blocks of a piece, [blocks, block_size], and what is left for a short one."""
        body = flat.numel() // self.block_size * self.block_size
        return flat[:body].view(-1, self.block_size), flat[body:]

    def _store(self, absmax: Tensor) -> Params:
        """Round float32 absmax[blocks] to the type they are stored in, with bitsandbytes' bytes."""
        if not self.double_quant:
            return {"absmax": absmax}
        offset = absmax.mean()  # as in bitsandbytes; its last bit can depend on how many threads torch has
        if rounding.refuse_nested(absmax) is None:
            stored, coarse = rounding.round_nested(absmax - offset, double_quant_table(absmax.device))
            return {"absmax": stored, "nested_absmax": coarse, "nested_offset": offset}
        stored, state = load_bitsandbytes().functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK_SIZE)
        return {"absmax": stored, "nested_absmax": state.absmax, "nested_offset": offset}

    def _spans(self, n: int) -> Iterator[tuple[slice, slice]]:
        """Pieces of `n` weights: (which weights, which blocks). Only the last may end in a short block."""
        for start in range(0, n, CHUNK):
            stop = min(start + CHUNK, n)
            yield slice(start, stop), slice(start // self.block_size, _pieces(stop, self.block_size))


@dataclass(frozen=True)
class Int8Rows(Grid):
    """int8 times a row's absmax / 127, as bitsandbytes stores LLM.int8() weights.

    `codes` hold the int8 bits viewed as uint8 (-1 is 255); `scb` float32[O] is the absmax of each row. The weight
    is rounded to float16 first, because bitsandbytes does.
    """

    bits: ClassVar[int] = 8

    @property
    def name(self) -> str:
        return "int8"

    def param_shapes(self, shape: tuple[int, ...]) -> ParamShapes:
        return {"scb": (torch.float32, (shape[0],))}

    def nearest(self, w: Tensor) -> tuple[Tensor, Params]:
        if rounding.refuse(w) is None:
            codes, scb = rounding.round_rows(w.detach())
            self._require_half(w, scb)
            return codes.view(torch.uint8), {"scb": scb}
        params = self.fit(w)
        return self.round(w, params), params

    def fit(self, w: Tensor) -> Params:
        scb = torch.empty(w.shape[0], dtype=torch.float32, device=w.device)
        for rows in _row_spans(w):
            scb[rows] = w[rows].detach().abs().amax(1).to(torch.float16)
        self._require_half(w, scb)
        return {"scb": scb}

    def round(self, w: Tensor, params: Params) -> Tensor:
        codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
        for rows in _row_spans(w):
            steps = w[rows].detach().to(torch.float16) * (127.0 / params["scb"][rows, None])
            steps.nan_to_num_(0).clamp_(-127, 127)  # an all-zero row gives 0 * inf
            codes[rows] = steps.add_(TO_INTEGER).sub_(TO_INTEGER)
        return codes.view(torch.uint8)

    def decode(self, codes: Tensor, params: Params, dtype: torch.dtype = torch.float32) -> Tensor:
        out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        step = params["scb"][:, None] * (1.0 / 127.0)
        for rows in _row_spans(codes):
            out[rows] = codes[rows].view(torch.int8) * step[rows]
        return out

    @staticmethod
    def _require_half(w: Tensor, scb: Tensor) -> None:
        if not scb.isfinite().all() and w.isfinite().all():
            largest = w.abs().max().item()
            raise FormatError(f"int8 goes through float16, which ends at 65504; the largest weight is {largest:g}")
        _require_finite(scb)


GRIDS: dict[str, type[Grid]] = {"nf4": Codebook, "fp4": Codebook, "int8": Int8Rows}


def legal_pairs() -> list[tuple[int, str]]:
    """Every (bits, type) that `make_grid` knows."""
    return [(cls.bits, name) for name, cls in GRIDS.items()]


def make_grid(bits: int, type: str, **fields: int | bool | None) -> Grid:
    """The grid a user means; `fields` are block_size and double_quant, None for the grid's own default.

    Raises RequestError naming what is legal.
    """
    if (bits, type) not in legal_pairs():
        legal = ", ".join(f"{b} {name}" for b, name in legal_pairs())
        raise RequestError(f"{bits} bits of type {type!r}: legal pairs of bits and type are {legal}")
    given = {name: value for name, value in fields.items() if value is not None}
    if type == "int8" and given:
        raise RequestError(f"int8 has one scale a row: leave out {' and '.join(given)}")
    return Grid.from_dict({"name": type, **given})


@cache
def load_bitsandbytes() -> ModuleType:
    """bitsandbytes, which is slow to import, without its warning that a CPU kernel which we never use is absent."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes
    finally:
        logger.setLevel(level)
    module: ModuleType = bitsandbytes
    return module


@cache
def codebook_table(kind: str, device: torch.device) -> Tensor:
    """The sixteen values of a codebook by code, float32[16]."""
    return torch.tensor({"nf4": NF4, "fp4": FP4}[kind], dtype=torch.float32, device=device)


@cache
def double_quant_table(device: torch.device) -> Tensor:
    """The 256 values of 8-bit dynamic quantization in rising order, float32[256] (arXiv:1511.04561).

    A sign, i = 0 ... 6 decades below one, and 2**i even steps within the decade; and 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = (10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += [*middles, *(-value for value in middles)]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@cache
def _midpoints(kind: str) -> tuple[Tensor, Tensor]:
    """Midpoints between neighbouring values in rising order, float32[15], and the codes of the intervals, uint8[16]."""
    values, order = codebook_table(kind, torch.device("cpu")).sort(stable=True)
    return (values[:-1] + values[1:]) / 2, order.to(torch.uint8)


@cache
def _cells(kind: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """[-1, 1] in cells of 1 / CELLS, so narrow that none holds two midpoints between neighbouring values.

    For each cell: the midpoint in it (infinity if there is none), float32, and the codes of the values below and
    above it, uint8. A weight on a midpoint goes to the lower neighbour.
    """
    midpoints, codes = _midpoints(kind)
    cells = midpoints.mul(CELLS).add(CELLS).int()
    assert cells.diff().all(), "two midpoints in one cell"
    bound = torch.full((2 * CELLS + 1,), torch.inf)
    bound[cells.long()] = midpoints
    lower = torch.bucketize(torch.arange(2 * CELLS + 1), cells.long())  # midpoints in cells before this one
    return bound.to(device), codes[lower].to(device), codes[(lower + 1).clamp(max=len(midpoints))].to(device)


def _row_spans(w: Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK // max(1, w.shape[1]))
    return (slice(start, min(start + rows, w.shape[0])) for start in range(0, w.shape[0], rows))


def _pieces(n: int, size: int) -> int:
    return -(n // -size)


def _require_finite(absmax: Tensor) -> None:
    if not absmax.isfinite().all():
        raise FormatError("the weight holds infinity or NaN, which no grid can hold")
