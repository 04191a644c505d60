"""GPTQ (Frantar et al., arXiv:2210.17323) on any grid: the rounding error of each column is compensated in the columns
that are not rounded yet, so that the layer's output changes least."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from neoquant.errors import RequestError
from neoquant.grids import Columns, Grid
from neoquant.native import gptq as native
from neoquant.quantizers.base import Quantizer
from neoquant.quantizers.hessian import LEGAL_DAMPING, Factor, Hessian, OutputFactor
from neoquant.tensor import QuantizedTensor

BLOCK = 128  # columns whose errors are gathered before the columns after them are corrected at once
REPORTED_ROWS = 256  # rows of a weight whose errors are reported, for all: measuring more takes as long as rounding
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
    """GPTQ, with activation order and, for attention, an output Hessian.

    order      static: inputs with large activations first, groups stay where they are, and the stored format does not
               change. off: in their natural order; a group's parameters are fitted when it is reached. dynamic
               (`desc_act`): large ones first, and groups of them in that order, which the result carries (not every
               format holds it).
    scales     range: they cover the weights. mse: of least squared error. weighted: each input's error by its diagonal
               entry of the Hessian. Both clip large weights, which cannot be compensated: on GPT-Neo they lose more.
    damping    part of the Hessian's mean diagonal that is added to all of it; raised tenfold where that is too little.
    objective  attention: queries, keys and values are rounded for the output of attention, not for their own: a row's
               error is also compensated in the later rows of its head (see `hessian.OutputFactor`). layer: every layer
               for its own output, as in the paper.
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

    def sample_report(self) -> Report:
        error = 0.012345678901234567
        return Report(self.objective, self.scales, self.damping, 0, False, 0, error, error, 0.0)

    def observer(self, in_features: int, device: torch.device | str = "cpu") -> Hessian:
        return Hessian(in_features, device)

    @property
    def uses_output_hessian(self) -> bool:
        return self.objective == "attention"

    def _quantize(
        self, w: Tensor, grid: Grid, hessian: Hessian | None, output_hessian: Tensor | None
    ) -> tuple[QuantizedTensor, Report]:
        started = time.perf_counter()
        assert hessian is not None
        output_hessian = self._used_output_hessian(output_hessian, len(w))
        factor = hessian.factor(self.order != "off", self.damping)
        order = hessian.order() if self.order == "dynamic" else None
        weight = w.detach().float() if order is None else w.detach().float()[:, order]
        refit = self._refit(hessian, order)
        columns = grid.columns(grid.fit(weight, refit.search, refit.importance), (w.shape[0], w.shape[1]))
        nearest = grid.decode(grid.round(weight, columns.params), columns.params)
        codes = self._round(weight, columns, refit, factor, hessian, output_hessian)
        q = QuantizedTensor(codes, grid, columns.params, None if order is None else order.int(), w.dtype)
        rounded = grid.decode(q.codes, q.params)
        error_nearest, error = _relative_errors(weight, (nearest, rounded), hessian, order, output_hessian)
        return q, Report(
            objective="layer" if output_hessian is None else "attention",
            scales=self.scales,
            damping=factor.damping,
            retries=factor.retries,
            double=factor.double,
            dead=int((hessian.diagonal == 0).sum()),
            error_nearest=error_nearest,
            error=error,
            seconds=time.perf_counter() - started,
        )

    def _used_output_hessian(self, output_hessian: Tensor | None, rows: int) -> Tensor | None:
        """`output_hessian` where it is used. Raises RequestError if it is not that of so many rows."""
        if output_hessian is None:
            return None
        if output_hessian.dim() != 3 or len(output_hessian) * output_hessian.shape[1] != rows:
            raise RequestError(f"output Hessian {list(output_hessian.shape)} is not that of {rows} rows")
        return output_hessian if self.uses_output_hessian else None

    def _refit(self, hessian: Hessian, order: Tensor | None) -> Refit:
        """How groups are fitted, with the inputs in `order`."""
        if self.scales != "weighted":
            return Refit(self.scales == "mse", None)
        return Refit(True, hessian.diagonal if order is None else hessian.diagonal[order])

    def _round(
        self,
        weight: Tensor,
        columns: Columns,
        refit: Refit,
        factor: Factor,
        hessian: Hessian,
        output_hessian: Tensor | None,
    ) -> Tensor:
        """The codes of weight[O, I], uint8[O, I]; unless the order is static, `columns` are fitted on the way."""
        output_factor = None if output_hessian is None else OutputFactor.of(output_hessian, self.damping)
        if self.order == "static":
            order = hessian.order()
            return round_columns(weight.T[order], factor.upper, columns, order, None, output_factor)
        natural = torch.arange(weight.shape[1])
        return round_columns(weight.T[natural], factor.upper, columns, natural, refit, output_factor)


@dataclass(frozen=True)
class Refit:
    """How a group's parameters are fitted when its first column is reached: the arguments of `Grid.fit`."""

    search: bool
    importance: Tensor | None  # [I]


def round_columns(
    weights: Tensor,
    upper: Tensor,
    columns: Columns,
    order: Tensor,
    refit: Refit | None = None,
    output_factor: OutputFactor | None = None,
    block: int = BLOCK,
) -> Tensor:
    """Round one column after the other, compensating errors in those that follow: codes uint8[O, I] in natural order.

    Args:
        weights: the weight's columns as rows, [I, O], in `order`.
        upper: the factor of the inverse Hessian in that order, [I, I].
        columns: the grid; its parameters are fitted on the way if `refit` is given, where columns are grouped.
        order: int64[I], which column of the weight stands in each row of `weights`; natural if `refit` is given.
        output_factor: how errors are compensated within the rows of a head, if they are.
        block: columns that are rounded before those after them are corrected, as one matrix product (section 3.3,
            "lazy batch-updates"). Changes only the speed.
    """
    original, weights = weights, weights.clone(memory_format=torch.contiguous_format)
    upper = upper.to(weights.dtype).contiguous()
    codes = torch.empty(weights.shape, dtype=torch.uint8, device=weights.device)
    width = len(weights) if refit is None or columns.width is None else min(columns.width, len(weights))
    if width < len(weights):  # a group is fitted when all errors before it are compensated
        block = math.gcd(block, width)
    round_block = _round_native if _is_native(weights, columns, output_factor) else _round_block
    for start in range(0, len(weights), block):
        stop = min(start + block, len(weights))
        if refit is not None and columns.width is not None and start % width == 0:
            end = min(start + width, len(weights))
            importance = None if refit.importance is None else refit.importance[start:end]
            columns.refit(start, weights[start:end].T, refit.search, importance)
        corner = upper[start:stop, start:stop]
        heads = None if output_factor is None else (output_factor, original[start:stop])
        errors = round_block(weights[start:stop], corner, columns, order[start:stop], heads, codes)
        if stop < len(weights):
            weights[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return codes.T.contiguous()


def _round_block(
    weights: Tensor,
    upper: Tensor,
    columns: Columns,
    order: Tensor,
    heads: tuple[OutputFactor, Tensor] | None,
    codes: Tensor,
) -> Tensor:
    """A block of `round_columns` in torch: writes codes[I, O], returns the errors over the diagonal, [n, O].

    `heads` are the output factor and the block's columns before any compensation, [n, O].
    """
    errors = torch.empty_like(weights)
    diagonal = upper.diagonal().tolist()
    for i, column in enumerate(order.tolist()):
        if heads is None:
            codes[column], values = columns.round(column, weights[i])
        else:
            values, compensation = _round_heads(weights[i], heads[0], heads[1][i], columns, column, codes[column])
            weights[i] += compensation
        torch.sub(weights[i], values, out=errors[i]).div_(diagonal[i])
        weights[i + 1 :].addr_(upper[i, i + 1 :], errors[i], alpha=-1)
    return errors


def _round_heads(
    w: Tensor, factor: OutputFactor, original: Tensor, columns: Columns, column: int, codes: Tensor
) -> tuple[Tensor, Tensor]:
    """One column w[O], row after row of all heads at once: the values, and each row's compensation for the rows before
    it, [O]."""
    heads, size = factor.row_order.shape
    rows = factor.row_order + torch.arange(heads, device=w.device)[:, None] * size
    values, compensation = torch.empty_like(w), w.new_zeros(heads, size)
    for i in range(size):
        row = rows[:, i]
        codes[row], values[row] = columns.round(column, w[row] + compensation[:, i], row)
        error = original[row] + compensation[:, i] - values[row]
        compensation[:, i + 1 :] -= error[:, None] * factor.unit[:, i, i + 1 :]
    in_place = torch.empty_like(w)
    in_place[rows] = compensation
    return values, in_place


def _is_native(weights: Tensor, columns: Columns, output_factor: OutputFactor | None) -> bool:
    if weights.dtype != torch.float32 or weights.device.type != "cpu" or columns.levels() is None:
        return False
    return native.refuse(0 if output_factor is None else output_factor.row_order.shape[1]) is None


def _round_native(
    weights: Tensor,
    upper: Tensor,
    columns: Columns,
    order: Tensor,
    heads: tuple[OutputFactor, Tensor] | None,
    codes: Tensor,
) -> Tensor:
    """The same in C."""
    levels = columns.levels()
    assert levels is not None
    coupled = None
    if heads is not None:
        factor, original = heads
        coupled = native.Heads(factor.unit.float(), factor.row_order.int(), original.contiguous())
    return native.round_columns(weights, upper, levels, order, coupled, codes)


def _relative_errors(
    weight: Tensor, results: tuple[Tensor, ...], hessian: Hessian, order: Tensor | None, output_hessian: Tensor | None
) -> list[float]:
    """The mean square of the output error of each of `results`[O, I], relative to the output of weight[O, I]."""
    H = hessian.matrix if order is None else hessian.matrix[order[:, None], order]
    rows = slice(None, None, max(1, len(weight) // REPORTED_ROWS) if output_hessian is None else 1)
    weight = weight[rows]
    norm = _output_norm(weight, H, output_hessian) or 1.0
    return [_output_norm(result[rows] - weight, H, output_hessian) / norm for result in results]


def _output_norm(w: Tensor, H: Tensor, output_hessian: Tensor | None) -> float:
    """tr(K w H wᵀ) of w[O, I], summed over heads: proportional to the mean square of the output."""
    left = w if output_hessian is None else (output_hessian @ w.view(len(output_hessian), -1, w.shape[1])).view_as(w)
    return float((w @ H).mul_(left).sum())
