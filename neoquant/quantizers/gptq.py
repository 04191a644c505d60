"""GPTQ (Frantar et al., arXiv:2210.17323) on any grid: each column's rounding error is pushed into the columns that
are not rounded yet, so that the layer's output changes least."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from neoquant.errors import RequestError
from neoquant.grids import Columns, Grid
from neoquant.native import feedback
from neoquant.quantizers.base import Quantizer
from neoquant.quantizers.hessian import LEGAL_DAMPING, Across, Hessian
from neoquant.tensor import QuantizedTensor

BLOCK = 128  # columns whose errors are gathered before the columns behind them are corrected at once
MEASURED = 256  # rows of a weight whose errors are reported, for all: measuring more takes as long as rounding
ORDERS = ("static", "off", "dynamic")
SCALES = ("range", "mse", "weighted")
OBJECTIVES = ("attention", "layer")


@dataclass(frozen=True)
class Report:
    """What happened to one layer. Errors are mean squares, relative to what there would be without the layer."""

    objective: str  # where they are measured: at the layer's own output, or where attention adds to the hidden states
    scales: str
    damping: float  # that was used
    retries: int  # how often it was raised for that
    double: bool  # single precision was not enough for the inverse
    dead: int  # inputs that were always zero
    error_nearest: float
    error: float
    seconds: float

    @property
    def remarks(self) -> list[str]:
        """What was not as usual, in words."""
        found = [f"{self.dead} inputs were always zero"] if self.dead else []
        found += [f"damping was raised to {self.damping:g}"] if self.retries else []
        found += ["the inverse needed double precision"] if self.double else []
        return found

    def to_dict(self) -> dict[str, Any]:
        """For records: everything but the time, so that two runs leave the same bytes."""
        values = {key: value for key, value in asdict(self).items() if key != "seconds"}
        return {**values, "remarks": self.remarks} if self.remarks else values


@dataclass(frozen=True)
class Gptq(Quantizer):
    """Rounding with error feedback.

    order      static: inputs with large activations first, groups stay where they are, and the stored format does not
               change. off: in their natural order; a group's parameters are fitted when its turn comes. dynamic:
               large ones first, and groups of them in that order, which the result carries (not every format holds it).
    scales     range: they cover the weights. mse: of least squared error. weighted: each input's error by its diagonal
               entry of the Hessian. Both clip large weights, which feedback cannot mend: on GPT-Neo they lose more.
    damping    part of the Hessian's mean diagonal that is added to all of it; raised tenfold where that is too little.
    objective  attention: queries, keys and values are rounded for what attention gives, not for what the layer gives:
               a row's error is pushed into the later rows of its head as well (see `hessian.Across`). layer: every
               layer for its own output, as in the paper.
    """

    order: str = "static"
    scales: str = "range"
    damping: float = 0.01
    objective: str = "attention"

    name: ClassVar[str] = "gptq"
    needs_calibration: ClassVar[bool] = True

    @property
    def stores_order(self) -> bool:
        return self.order == "dynamic"

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise RequestError(f"damping {self.damping}: {LEGAL_DAMPING}")
        if self.order not in ORDERS:
            raise RequestError(f"activation order {self.order!r}: legal are {', '.join(ORDERS)}")
        if self.scales not in SCALES:
            raise RequestError(f"scales {self.scales!r}: legal are {', '.join(SCALES)}")
        if self.objective not in OBJECTIVES:
            raise RequestError(f"objective {self.objective!r}: legal are {', '.join(OBJECTIVES)}")

    def observer(self, columns: int, device: torch.device | str = "cpu") -> Hessian:
        return Hessian(columns, device)

    @property
    def uses_output_hessian(self) -> bool:
        return self.objective == "attention"

    def _quantize(
        self, w: Tensor, grid: Grid, hessian: Hessian | None, output_hessian: Tensor | None
    ) -> tuple[QuantizedTensor, Report]:
        started = time.perf_counter()
        assert hessian is not None
        if output_hessian is not None and (
            output_hessian.dim() != 3 or len(output_hessian) * output_hessian.shape[1] != len(w)
        ):
            raise RequestError(f"output Hessian {list(output_hessian.shape)} is not that of {len(w)} rows")
        factor = hessian.factor(self.order != "off", self.damping)
        across = (
            None if output_hessian is None or not self.uses_output_hessian else Across.of(output_hessian, self.damping)
        )
        search, importance = self.scales != "range", hessian.diagonal if self.scales == "weighted" else None
        single, order = w.detach().float(), None
        if self.order == "dynamic":
            order = hessian.order()
            single = single[:, order]
            importance = None if importance is None else importance[order]
        shape = (w.shape[0], w.shape[1])
        columns = grid.columns(grid.fit(single, search, importance), shape)
        nearest = grid.decode(grid.round(single, columns.params), columns.params)
        sequence = hessian.order() if self.order == "static" else torch.arange(shape[1])
        fitting = None if self.order == "static" else Fitting(search, importance)
        codes = feed_back(single.T[sequence], factor.upper, columns, sequence, fitting, across)
        q = QuantizedTensor(codes, grid, columns.params, None if order is None else order.int(), w.dtype)

        H = hessian.matrix if order is None else hessian.matrix[order[:, None], order]
        weighing = output_hessian if across is not None else None
        rows = slice(None, None, max(1, len(w) // MEASURED) if weighing is None else 1)
        single, nearest, decoded = single[rows], nearest[rows], grid.decode(q.codes, q.params)[rows]
        size = _square(single, H, weighing) or 1.0
        report = Report(
            objective="layer" if across is None else "attention",
            scales=self.scales,
            damping=factor.damping,
            retries=factor.retries,
            double=factor.double,
            dead=int((hessian.diagonal == 0).sum()),
            error_nearest=_square(nearest - single, H, weighing) / size,
            error=_square(decoded - single, H, weighing) / size,
            seconds=time.perf_counter() - started,
        )
        return q, report


@dataclass(frozen=True)
class Fitting:
    """How a group's parameters are fitted when its turn comes."""

    search: bool
    importance: Tensor | None  # [I]


def feed_back(
    work: Tensor,
    upper: Tensor,
    columns: Columns,
    sequence: Tensor,
    fitting: Fitting | None = None,
    across: Across | None = None,
    block: int = BLOCK,
) -> Tensor:
    """Round column after column, correcting those that follow: codes uint8[O, I], columns in their natural order.

    Args:
        work: the weight's columns as rows, [I, O], in the order of `sequence`.
        upper: the factor of the inverse Hessian in that order, [I, I].
        columns: the grid; its parameters are fitted on the way if `fitting` is given, where columns are grouped.
        sequence: which column of the weight stands in each row of `work`; natural if `fitting` is given.
        across: how the rows of a head hang together, if they do.
        block: how many columns are dealt with before those behind them are corrected, as one matrix product. Changes
            nothing but the speed.
    """
    plain, work = work, work.clone(memory_format=torch.contiguous_format)
    upper = upper.to(work.dtype).contiguous()
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    width = len(work) if fitting is None or columns.width is None else min(columns.width, len(work))
    if width < len(work):  # a group is fitted when every error before it has reached it
        block = math.gcd(block, width)
    round_block = _round_native if _is_native(work, columns, across) else _round_block
    for start in range(0, len(work), block):
        stop = min(start + block, len(work))
        if fitting is not None and columns.width is not None and start % width == 0:
            end = min(start + width, len(work))
            weight = None if fitting.importance is None else fitting.importance[start:end]
            columns.refit(start, work[start:end].T, fitting.search, weight)
        inside = upper[start:stop, start:stop]
        given = None if across is None else (across, plain[start:stop])
        errors = round_block(work[start:stop], inside, columns, sequence[start:stop], given, codes)
        if stop < len(work):
            work[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return codes.T.contiguous()


def _round_block(
    work: Tensor,
    upper: Tensor,
    columns: Columns,
    sequence: Tensor,
    across: tuple[Across, Tensor] | None,
    codes: Tensor,
) -> Tensor:
    """A block of `feed_back` in torch: fills in codes[I, O] and returns the errors, [columns of the block, O]."""
    errors = torch.empty_like(work)
    diagonal = upper.diagonal().tolist()
    for i, place in enumerate(sequence.tolist()):
        if across is None:
            codes[place], values = columns.round(place, work[i])
        else:
            values, pushed = _round_heads(work[i], across[0], across[1][i], columns, place, codes[place])
            work[i] += pushed
        torch.sub(work[i], values, out=errors[i]).div_(diagonal[i])
        work[i + 1 :].addr_(upper[i, i + 1 :], errors[i], alpha=-1)
    return errors


def _round_heads(
    w: Tensor, across: Across, plain: Tensor, columns: Columns, place: int, codes: Tensor
) -> tuple[Tensor, Tensor]:
    """One column w[O], row after row of every head at once: the values, and what earlier rows pushed into each, [O]."""
    heads, size = across.turn.shape
    rows = across.turn + torch.arange(heads, device=w.device)[:, None] * size
    values, pushed = torch.empty_like(w), w.new_zeros(heads, size)
    for i in range(size):
        now = rows[:, i]
        codes[now], values[now] = columns.round(place, w[now] + pushed[:, i], now)
        error = plain[now] + pushed[:, i] - values[now]
        pushed[:, i + 1 :] -= error[:, None] * across.unit[:, i, i + 1 :]
    at_rows = torch.empty_like(w)
    at_rows[rows] = pushed
    return values, at_rows


def _is_native(work: Tensor, columns: Columns, across: Across | None) -> bool:
    if work.dtype != torch.float32 or work.device.type != "cpu" or columns.levels() is None:
        return False
    return feedback.refuse(0 if across is None else across.turn.shape[1]) is None


def _round_native(
    work: Tensor,
    upper: Tensor,
    columns: Columns,
    sequence: Tensor,
    across: tuple[Across, Tensor] | None,
    codes: Tensor,
) -> Tensor:
    """The same in C."""
    levels = columns.levels()
    assert levels is not None
    heads = None
    if across is not None:
        heads = feedback.Heads(across[0].unit.float(), across[0].turn.int(), across[1].contiguous())
    return feedback.round_columns(work, upper, levels, sequence, heads, codes)


def _square(w: Tensor, H: Tensor, outputs: Tensor | None) -> float:
    """The mean square of w[O, I] times the inputs, seen through `outputs`[heads, size, size], but for a factor."""
    seen = w if outputs is None else (outputs @ w.view(len(outputs), -1, w.shape[1])).view_as(w)
    return float((w @ H).mul_(seen).sum())
