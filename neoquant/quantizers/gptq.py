"""GPTQ (Frantar et al., arXiv:2210.17323) on any grid: each column's rounding error is pushed into the columns that
are not rounded yet, so that the layer's output changes least."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from neoquant.errors import FormatError, RequestError
from neoquant.grids import Columns, Grid
from neoquant.quantizers.base import Quantizer
from neoquant.quantizers.hessian import Hessian
from neoquant.tensor import QuantizedTensor

BLOCK = 128  # columns whose errors are gathered before the columns behind them are corrected at once
ORDERS = ("static", "off", "dynamic")
SCALES = ("range", "mse", "weighted")


@dataclass(frozen=True)
class Report:
    """What happened to one layer. Errors are of its output, mean squares relative to the output's own."""

    damping: float
    double: bool  # single precision was not enough for the inverse
    dead: int  # inputs that were always zero
    error_nearest: float
    error: float
    seconds: float

    @property
    def remarks(self) -> list[str]:
        """What was not as usual, in words."""
        found = [f"{self.dead} inputs were always zero"] if self.dead else []
        found += ["the inverse needed double precision"] if self.double else []
        return found

    def to_dict(self) -> dict[str, float | int | bool]:
        """For records: everything but the time, so that two runs leave the same bytes."""
        return {key: value for key, value in asdict(self).items() if key != "seconds"}


@dataclass(frozen=True)
class Gptq(Quantizer):
    """Rounding with error feedback.

    order    static: inputs with large activations first, groups stay where they are, and the stored format does not
             change. off: in their natural order; a group's parameters are fitted when its turn comes. dynamic: large
             ones first, and groups of them in that order, which the result carries (not every format holds it).
    scales   range: they cover the weights. mse: of least squared error. weighted: each input's error by its diagonal
             entry of the Hessian.
    damping  part of the Hessian's mean diagonal that is added to all of it; raised tenfold where that is too little.
    """

    order: str = "static"
    scales: str = "range"
    damping: float = 0.01

    name: ClassVar[str] = "gptq"
    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise RequestError(f"activation order {self.order!r}: legal are {', '.join(ORDERS)}")
        if self.scales not in SCALES:
            raise RequestError(f"scales {self.scales!r}: legal are {', '.join(SCALES)}")

    def observer(self, columns: int, device: torch.device | str = "cpu") -> Hessian:
        return Hessian(columns, device)

    def quantize(self, w: Tensor, grid: Grid, seen: Any = None) -> QuantizedTensor:
        return self.run(w, grid, seen)[0]

    def run(self, w: Tensor, grid: Grid, seen: Hessian) -> tuple[QuantizedTensor, Report]:
        """Put w[O, I] on `grid`: the result and what happened."""
        started = time.perf_counter()
        if w.dim() != 2 or not w.is_floating_point() or 0 in w.shape:
            raise FormatError(f"only floating-point matrices can be quantized, got {w.dtype} {list(w.shape)}")
        if not isinstance(seen, Hessian) or seen.columns != w.shape[1] or not seen.rows:
            raise RequestError("gptq needs the layer's inputs: observe some first")
        factor = seen.factor(self.order != "off", self.damping)
        search, importance = self.scales != "range", seen.diagonal if self.scales == "weighted" else None
        single, order = w.detach().float(), None
        if self.order == "dynamic":
            order = seen.order()
            single = single[:, order]
            importance = None if importance is None else importance[order]
        shape = (w.shape[0], w.shape[1])
        columns = grid.columns(grid.fit(single, search, importance), shape)
        nearest = grid.decode(grid.round(single, columns.params), columns.params)
        sequence = seen.order() if self.order == "static" else torch.arange(shape[1])
        fitting = None if self.order == "static" else Fitting(search, importance)
        codes = feed_back(single.T[sequence], factor.upper, columns, sequence, fitting)
        q = QuantizedTensor(codes, grid, columns.params, None if order is None else order.int(), w.dtype)
        return q, self._report(single, nearest, q, seen, order, factor.damping, factor.double, started)

    def _report(
        self,
        w: Tensor,
        nearest: Tensor,
        q: QuantizedTensor,
        seen: Hessian,
        order: Tensor | None,
        damping: float,
        double: bool,
        started: float,
    ) -> Report:
        H = seen.matrix if order is None else seen.matrix[order][:, order]
        size = _square(w, H) or 1.0
        return Report(
            damping=damping,
            double=double,
            dead=int((seen.diagonal == 0).sum()),
            error_nearest=_square(nearest.sub_(w), H) / size,
            error=_square(q.grid.decode(q.codes, q.params).sub_(w), H) / size,
            seconds=time.perf_counter() - started,
        )


@dataclass(frozen=True)
class Fitting:
    """How a group's parameters are fitted when its turn comes."""

    search: bool
    importance: Tensor | None  # [I]


def feed_back(
    work: Tensor, upper: Tensor, columns: Columns, sequence: Tensor, fitting: Fitting | None = None, block: int = BLOCK
) -> Tensor:
    """Round column after column, correcting those that follow: codes uint8[O, I], columns in their natural order.

    Args:
        work: the weight's columns as rows, [I, O], in the order of `sequence`; used up.
        upper: the factor of the inverse Hessian in that order, [I, I].
        columns: the grid; its parameters are fitted on the way if `fitting` is given, where columns are grouped.
        sequence: which column of the weight stands in each row of `work`; natural if `fitting` is given.
        block: how many rows are dealt with before those behind them are corrected. Changes nothing but the speed.
    """
    work = work.contiguous()
    upper = upper.to(work.dtype)
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    errors = torch.empty_like(work[:block])
    diagonal, places = upper.diagonal().tolist(), sequence.tolist()
    for start in range(0, len(work), block):
        stop = min(start + block, len(work))
        for i in range(start, stop):
            if fitting is not None and columns.width is not None and i % columns.width == 0:
                end = min(i + columns.width, len(work))
                group = work[i:end].clone()
                if end > stop:  # what the block's errors so far will do to the columns behind it
                    behind = max(i, stop)
                    group[behind - i :].addmm_(upper[start:i, behind:end].T, errors[: i - start], alpha=-1)
                weight = None if fitting.importance is None else fitting.importance[i:end]
                columns.refit(i, group.T, fitting.search, weight)
            codes[places[i]], values = columns.round(places[i], work[i])
            error = torch.sub(work[i], values, out=errors[i - start]).div_(diagonal[i])
            if i + 1 < stop:
                work[i + 1 : stop].addr_(upper[i, i + 1 : stop], error, alpha=-1)
        if stop < len(work):
            work[stop:].addmm_(upper[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    return codes.T.contiguous()


def _square(w: Tensor, H: Tensor) -> float:
    """The mean square of w[O, I] times the inputs, but for a factor that all have."""
    return float((w @ H).mul_(w).sum())
