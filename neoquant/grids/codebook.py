"""NF4 and FP4: sixteen values times the absmax of a block (QLoRA, arXiv:2305.14314).

The tables, and the table of double quantization, live here and nowhere else.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from neoquant.errors import RequestError
from neoquant.grids.base import Columns, Grid, Params, ParamShapes, count_pieces, require_finite, spans
from neoquant.grids.decoding import NESTED_GROUP, Decoding, Scale, tensor_of
from neoquant.native import rounding, team_size
from neoquant.native.gptq import Levels

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
CELLS = 1024  # cells between 0 and 1 when the nearest value is looked up
SEARCHED = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 1.04, 1.08)  # parts of the absmax that a scale search tries
SUMMED_ALONE = 32768  # numbers that torch adds up on one thread
_CPU = torch.device("cpu")
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
TABLES = {"nf4": NF4, "fp4": FP4}


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
    legal_bits: ClassVar[tuple[int, ...]] = (4,)
    options: ClassVar[tuple[str, ...]] = ("block_size", "double_quant")

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
    def label(self) -> str:
        block = "" if self.block_size == 64 else f"-b{self.block_size}"
        return f"{self.kind}{block}{'' if self.double_quant else '-single'}"

    @property
    def zero_code(self) -> int:
        """The code that a zero is rounded to."""
        return {"nf4": 7, "fp4": 0}[self.kind]

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """The sixteen values by code, float32[16]."""
        return tensor_of(TABLES[self.kind], torch.device(device))

    @cached_property
    def decoding(self) -> Decoding:
        scale = Scale("absmax")
        if self.double_quant:
            table = tuple(double_quant_table(torch.device("cpu")).tolist())
            scale = Scale("absmax", table=table, nested=("nested_absmax", "nested_offset"))
        return Decoding(self.bits, scale, self.block_size, flat=True, table=TABLES[self.kind], zero_code=self.zero_code)

    def describe(self) -> dict[str, Any]:
        fields = super().describe()
        del fields["kind"]  # which is its name
        return fields

    @classmethod
    def from_fields(cls, name: str, fields: dict[str, Any]) -> Grid:
        return cls(kind=name, **fields)

    def param_shapes(self, shape: tuple[int, ...]) -> ParamShapes:
        blocks = count_pieces(shape[0] * shape[1], self.block_size)
        if not self.double_quant:
            return {"absmax": (torch.float32, (blocks,))}
        return {
            "absmax": (torch.uint8, (blocks,)),
            "nested_absmax": (torch.float32, (count_pieces(blocks, NESTED_GROUP),)),
            "nested_offset": (torch.float32, ()),
        }

    def nearest(self, w: Tensor) -> tuple[Tensor, Params]:
        if rounding.refuse(w) is None:
            flat = w.detach().reshape(-1)
            codes, absmax = rounding.round_blocks(flat, self.block_size, *_midpoints(self.kind))
            require_finite(absmax)
            return codes.view(w.shape), self._store(absmax)
        absmax = self._absmax(w)
        return self._codes(w, absmax), self._store(absmax)

    def fit(self, w: Tensor, search: bool = False, importance: Tensor | None = None) -> Params:
        absmax = self._absmax(w)
        return self._store(self._search(w, absmax, importance) if search else absmax)

    def round(self, w: Tensor, params: Params) -> Tensor:
        return self._codes(w, self.scales(params))

    def scales(self, params: Params) -> Tensor:
        """The absmax of every block as float32[blocks], double quantization undone."""
        return self.decoding.scale.of(params)

    def with_scales(self, params: Params, scale: Tensor) -> Params | None:
        return self._store(scale)

    def _absmax(self, w: Tensor) -> Tensor:
        """The largest magnitude of every block, float32[blocks]."""
        flat = w.detach().reshape(-1)
        absmax = torch.empty(count_pieces(flat.numel(), self.block_size), dtype=torch.float32, device=w.device)
        for span, blocks in self._spans(flat.numel()):
            whole, rest = self._split(flat[span].abs())
            absmax[blocks][: len(whole)] = whole.amax(1)
            if len(rest):  # bitsandbytes gives an all-zero short block this absmax
                absmax[blocks][-1] = rest.amax().float().clamp(min=SMALLEST_SCALE)
        require_finite(absmax)
        return absmax

    def _codes(self, w: Tensor, absmax: Tensor) -> Tensor:
        """The code of the value nearest to each weight, uint8[O, I]."""
        flat = w.detach().reshape(-1)
        codes = torch.empty(flat.numel(), dtype=torch.uint8, device=w.device)
        absmax = absmax.clamp(min=SMALLEST_SCALE)
        for span, blocks in self._spans(flat.numel()):
            whole, rest = self._split(flat[span].float())
            # bitsandbytes multiplies whole blocks by the reciprocal and divides a short one: ties depend on it
            scaled = (whole * (1 / absmax[blocks][: len(whole), None])).view(-1)
            if len(rest):
                scaled = torch.cat([scaled, rest / absmax[blocks][-1]])
            codes[span] = nearest_codes(self.kind, scaled)
        return codes.view(w.shape)

    def columns(self, params: Params, shape: tuple[int, int]) -> Columns:
        return _CodebookColumns(self, params, shape)

    def _search(self, w: Tensor, absmax: Tensor, importance: Tensor | None) -> Tensor:
        """Scales near the blocks' absmax with a smaller squared error, float32[blocks]."""
        flat = w.detach().reshape(-1)
        weights = torch.ones(1) if importance is None else importance.float()
        weights = weights.to(w.device).expand(w.shape).reshape(-1)
        found = absmax.clamp(min=SMALLEST_SCALE)
        for span, blocks in self._spans(flat.numel()):
            scales = found[blocks]
            pieces = zip(self._split(flat[span].float()), self._split(weights[span]), strict=True)
            for number, (values, weight) in enumerate(pieces):  # the whole blocks, then the short one
                if values.numel() and number == 0:
                    scales[: len(values)] = self._best(values, weight, scales[: len(values)])
                elif values.numel():
                    scales[-1:] = self._best(values[None], weight[None], scales[-1:])
        return found

    def _best(self, blocks: Tensor, weight: Tensor, absmax: Tensor) -> Tensor:
        """Of some parts of absmax[N], for each of blocks[N, B] that of the smallest weighted error, float32[N]."""
        table = self.table(blocks.device)
        best, least = absmax.clone(), torch.full_like(absmax, torch.inf)
        for part in SEARCHED:
            tried = absmax * part
            codes = nearest_codes(self.kind, (blocks * (1 / tried[:, None])).view(-1))
            values = table.index_select(0, codes.int()).view(blocks.shape).mul_(tried[:, None])
            error = values.sub_(blocks).square_().mul_(weight).sum(1)
            best = torch.where(error < least, tried, best)
            least = torch.minimum(error, least)
        return best

    def _split(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """The whole blocks of a piece, [blocks, block_size], and what is left for a short one."""
        body = flat.numel() // self.block_size * self.block_size
        return flat[:body].view(-1, self.block_size), flat[body:]

    def _store(self, absmax: Tensor) -> Params:
        """Round float32 absmax[blocks] to the type they are stored in, with bitsandbytes' bytes."""
        if not self.double_quant:
            return {"absmax": absmax}
        offset = _mean(absmax, team_size())
        if rounding.refuse_nested(absmax) is None:
            stored, coarse = rounding.round_nested(absmax - offset, double_quant_table(absmax.device))
            return {"absmax": stored, "nested_absmax": coarse, "nested_offset": offset}
        table = double_quant_table(absmax.device)  # bitsandbytes' own, which it keeps on the device that asks first
        functional = load_bitsandbytes().functional
        stored, state = functional.quantize_blockwise(absmax - offset, code=table, blocksize=NESTED_GROUP)
        return {"absmax": stored, "nested_absmax": state.absmax, "nested_offset": offset}

    def _spans(self, n: int) -> Iterator[tuple[slice, slice]]:
        """Pieces of `n` weights: (which weights, which blocks). Only the last may end in a short block."""
        for span in spans(n):
            yield span, slice(span.start // self.block_size, count_pieces(span.stop, self.block_size))


def _mean(absmax: Tensor, threads: int) -> Tensor:
    """The mean of absmax[n] as torch, and with it bitsandbytes, has it on so many threads, whose number its last bit
    depends on: each adds up as long a part, of so many numbers at least."""
    parts = min(threads, count_pieces(absmax.numel(), SUMMED_ALONE))
    if absmax.device.type != "cpu" or torch.get_num_threads() == threads or parts == 1:
        return absmax.mean()
    sums, running = absmax.new_zeros(threads), torch.get_num_threads()
    torch.set_num_threads(1)  # else a long part would be shared out itself
    try:
        for part, piece in enumerate(torch.split(absmax, count_pieces(absmax.numel(), parts))):
            sums[part] = piece.sum()
        return sums.sum() / absmax.numel()
    finally:
        torch.set_num_threads(running)


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


class _CodebookColumns(Columns):
    def __init__(self, grid: Codebook, params: Params, shape: tuple[int, int]) -> None:
        super().__init__(grid, params, shape)
        self.kind, self.block = grid.kind, grid.block_size
        self.table = grid.table(params["absmax"].device)
        self.aligned = shape[1] % self.block == 0  # blocks do not cross rows
        if self.aligned and not grid.double_quant:
            self.width = self.block
        scales = grid.scales(params).clamp(min=SMALLEST_SCALE)
        self.scales = scales.view(shape[0], -1).T.contiguous() if self.aligned else scales
        self.first = torch.arange(shape[0], device=scales.device) * shape[1]  # of each row, in the flattened weight
        self.body = shape[0] * shape[1] // self.block * self.block

    def round(self, j: int, w: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        at = (self.first if rows is None else self.first[rows]) + j
        if self.aligned:
            scale = self.scales[j // self.block]
            scale = scale if rows is None else scale[rows]
        else:
            scale = self.scales[at // self.block]
        single = w.float()
        scaled = single * (1 / scale)
        if (self.shape[0] - 1) * self.shape[1] + j >= self.body:  # the last, short block: bitsandbytes divides there
            scaled = torch.where(at < self.body, scaled, single / scale)
        codes = nearest_codes(self.kind, scaled)
        return codes, (self.table.index_select(0, codes.int()) * scale).to(w.dtype)

    def levels(self) -> Levels | None:
        if not self.aligned:
            return None
        bounds, order = _midpoints(self.kind, self.scales.device)
        return Levels(self.scales, 1 / self.scales, self.block, bounds=bounds, order=order, table=self.table)

    def _reload(self, group: int) -> None:
        absmax = self.params["absmax"].view(self.shape[0], -1)[:, group]
        self.scales[group] = absmax.clamp(min=SMALLEST_SCALE)


def nearest_codes(kind: str, scaled: Tensor) -> Tensor:
    """The codes, uint8[n], of the values nearest to `scaled`[n], float32, which is clamped to [-1, 1] in place."""
    bound, below, above = _cells(kind, scaled.device)
    cell = scaled.clamp_(-1, 1).mul(CELLS).add_(CELLS).int()
    higher = scaled > bound.index_select(0, cell)
    return torch.where(higher, above.index_select(0, cell), below.index_select(0, cell))


@cache
def _midpoints(kind: str, device: torch.device = _CPU) -> tuple[Tensor, Tensor]:
    """Midpoints between neighbouring values in rising order, float32[15], and the codes of the intervals, uint8[16]."""
    values, order = tensor_of(TABLES[kind], _CPU).sort(stable=True)
    return ((values[:-1] + values[1:]) / 2).to(device), order.to(device, torch.uint8)


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
