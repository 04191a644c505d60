"""GPTQ (Frantar et al., arXiv:2210.17323) on any grid: the rounding error of each column is compensated in the columns
that are not rounded yet, so that the layer's output changes least."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from neoquant.errors import RequestError
from neoquant.grids import Columns, Grid, Params
from neoquant.native import trellis
from neoquant.quantizers.base import Quantizer
from neoquant.quantizers.feedback import TALL, Refit, round_columns, whole_block
from neoquant.quantizers.hessian import LEGAL_DAMPING, Factor, Hessian, OutputFactor, SpanFactor, diagonal_pieces
from neoquant.tensor import QuantizedTensor

REPORTED_ROWS = 256  # of a weight, whose part of its errors is reported: measuring all takes as long as rounding
ORDERS = ("static", "off", "dynamic")
SCALES = ("range", "mse", "weighted")
OBJECTIVES = ("attention", "layer", "model")
GRADIENT_DAMPING = 0.1  # of output Hessians from gradients, which are shrunk already: as a part of `damping`
COARSE_DAMPING = 0.1  # of the same where codes have two bits: errors, and what they move in other rows, are large
PIECE = 64  # coupled rows where neither the native library nor Triton runs


@dataclass(frozen=True)
class Report:
    """What happened to one layer. Errors are mean squares, relative to what there would be without the layer."""

    objective: str  # where they are measured: at the layer's own output, where attention adds to the hidden states, or
    # in the model's loss
    scales: str
    damping: float  # that was used
    retries: int  # how often it was raised for that
    double: bool  # single precision was not enough for the inverse
    dead: int  # inputs that were always zero
    error_nearest: float
    error: float
    seconds: float
    chained: bool = False  # its rows are, so that they were weighed and not coupled

    @property
    def remarks(self) -> list[str]:
        """What was not as usual, in words."""
        found = [f"{self.dead} inputs were always zero"] if self.dead else []
        found += [f"damping was raised to {self.damping:g}"] if self.retries else []
        found += ["the inverse needed double precision"] if self.double else []
        found += ["rows of a trellis are not coupled, but weighed"] if self.chained else []
        return found

    def to_dict(self) -> dict[str, Any]:
        """For records: everything but the time, so that two runs leave the same bytes."""
        values = {key: value for key, value in asdict(self).items() if key not in ("seconds", "chained")}
        return {**values, "remarks": self.remarks} if self.remarks else values


@dataclass(frozen=True)
class Gptq(Quantizer):
    """GPTQ, with activation order and, unless it is as published, an output Hessian.

    order      static: inputs with large activations first, groups stay where they are, and the stored format does not
               change. off: in their natural order; a group's parameters are fitted when it is reached. dynamic
               (`desc_act`): large ones first, and groups of them in that order, which the result carries (not every
               format holds it).
    scales     range: they cover the weights. mse: of least squared error. weighted: each input's error by its diagonal
               entry of the Hessian. Both clip large weights, which cannot be compensated: on GPT-Neo they lose more.
    damping    part of the Hessian's mean diagonal that is added to all of it; raised tenfold where that is too little.
               Output Hessians from gradients come shrunk by what their samples say (`calibration.loss_hessian`); a
               tenth of the damping is added to them, and of codes of two bits a tenth of the mean diagonal.
    objective  attention: queries, keys and values are rounded for the output of attention, not for their own: a row's
               error is also compensated in the later rows of its head (see `hessian.OutputFactor`). layer: every layer
               for its own output, as in the paper. model: every layer for the model's loss, to second order: all its
               rows are coupled (see `calibration.loss_hessian`). A trellis chains the rows itself: for
               attention their errors only weigh there, as the output Hessian's diagonal says; for the model the native
               library searches it with their compensation, and where that does not run, they only weigh as well.
    correction part of the way that a weight first moves to make up for what its layer's output lacks, since earlier
               layers are quantized (see `calibration.missing_output`), with `damping` as the ridge: 0 to 1.
    """

    order: str = "static"
    scales: str = "range"
    damping: float = 0.01
    objective: str = "attention"
    correction: float = 0.0

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

        if not 0 <= self.correction <= 1:
            raise RequestError(f"correction {self.correction}: legal is 0 (none) to 1")

    def sample_report(self, grid: Grid, before_attention: bool) -> Report:
        error, objective = 0.012345678901234567, self.objective
        if objective == "attention" and not before_attention:
            objective = "layer"
        chained = objective != "layer" and not self._couples(grid)
        objective = "layer" if chained else objective
        return Report(objective, self.scales, self.damping, 0, False, 0, error, error, 0.0, chained)

    def observer(self, in_features: int, device: torch.device | str = "cpu") -> Hessian:
        return Hessian(in_features, device)

    @property
    def uses_output_hessian(self) -> bool:
        return self.objective != "layer"

    @property
    def needs_gradients(self) -> bool:
        return self.objective == "model"

    def _output_damping(self, grid: Grid) -> float:
        if not self.needs_gradients:
            return self.damping
        return max(self.damping, COARSE_DAMPING) if grid.bits <= 2 else self.damping * GRADIENT_DAMPING

    @property
    def needs_reference(self) -> bool:
        return self.correction > 0

    def _quantize(
        self, w: Tensor, grid: Grid, hessian: Hessian | None, output_hessian: Tensor | None, missing: Tensor | None
    ) -> tuple[QuantizedTensor, Report]:
        started = time.perf_counter()
        assert hessian is not None
        given, output_hessian = output_hessian, self._used_output_hessian(output_hessian, len(w), grid)
        factor = hessian.factor(self.order != "off", self.damping)
        order = hessian.order() if self.order == "dynamic" else None
        weight = self._corrected(w.detach().float(), hessian, missing)
        weight = weight if order is None else weight[:, order]
        refit = self._refit(hessian, order)
        params = grid.fit(weight, refit.search, refit.importance)
        nearest = grid.decode(grid.round(weight, params), params)
        chained = given is not None and self.uses_output_hessian and output_hessian is None
        by_rows = self.uses_output_hessian and grid.decoding.trellis is not None
        rows = given.diagonal(dim1=1, dim2=2).flatten() if given is not None and by_rows else None
        codes, params = self._round(weight, grid, params, refit, factor, hessian, output_hessian, rows)
        q = QuantizedTensor(codes, grid, params, None if order is None else order.int(), w.dtype)
        rounded = grid.decode(q.codes, q.params)
        error_nearest, error = _relative_errors(weight, (nearest, rounded), hessian, order, output_hessian)
        return q, Report(
            objective="layer" if output_hessian is None else self.objective,
            scales=self.scales,
            damping=factor.damping,
            retries=factor.retries,
            double=factor.double,
            dead=int((hessian.diagonal == 0).sum()),
            error_nearest=error_nearest,
            error=error,
            seconds=time.perf_counter() - started,
            chained=chained,
        )

    def _corrected(self, weight: Tensor, hessian: Hessian, missing: Tensor | None) -> Tensor:
        """weight[O, I], moved towards the one that gives what the layer's output lacks."""
        if missing is None or not self.correction:
            return weight
        if missing.shape != weight.shape:
            raise RequestError(f"missing output {list(missing.shape)} is not that of a weight {list(weight.shape)}")
        return weight + self.correction * hessian.solve(missing, self.order != "off", self.damping)

    def _couples(self, grid: Grid) -> bool:
        """Whether errors are compensated in other rows of a column. Of a trellis only few paths are searched then: too
        few for what the rows of an attention head have in common."""
        return grid.decoding.trellis is None or (self.needs_gradients and trellis.refuse() is None)

    def _used_output_hessian(self, output_hessian: Tensor | None, rows: int, grid: Grid) -> Tensor | None:
        """`output_hessian` where it is used. Raises RequestError if it is not that of so many rows."""
        if output_hessian is None:
            return None
        if output_hessian.dim() != 3 or len(output_hessian) * output_hessian.shape[1] != rows:
            raise RequestError(f"output Hessian {list(output_hessian.shape)} is not that of {rows} rows")
        return output_hessian if self.uses_output_hessian and self._couples(grid) else None

    def _output_factor(self, output_hessian: Tensor, weight: Tensor, columns: Columns) -> OutputFactor | SpanFactor:
        """By what errors are compensated in other rows of weight[O, I]."""
        place, chain = weight.device, columns.grid.decoding.trellis
        if chain is not None:
            return SpanFactor.of(output_hessian.to(place), chain.span, self._output_damping(columns.grid))
        if whole_block(weight, columns) is None:
            output_hessian = diagonal_pieces(output_hessian, PIECE)
        # a GPU takes more launches for many small matrices than they are worth
        output_hessian = output_hessian.to("cpu" if output_hessian.shape[1] <= TALL else place)
        return OutputFactor.of(output_hessian, self._output_damping(columns.grid)).to(place)

    def _refit(self, hessian: Hessian, order: Tensor | None) -> Refit:
        """How groups are fitted, with the inputs in `order`."""
        if self.scales != "weighted":
            return Refit(self.scales == "mse", None)
        return Refit(True, hessian.diagonal if order is None else hessian.diagonal[order])

    def _round(
        self,
        weight: Tensor,
        grid: Grid,
        params: Params,
        refit: Refit,
        factor: Factor,
        hessian: Hessian,
        output_hessian: Tensor | None,
        rows: Tensor | None,
    ) -> tuple[Tensor, Params]:
        """The codes of weight[O, I], uint8[O, I], and the parameters, which, unless the order is static, are fitted on
        the way. `rows`[O] is what their errors count, where the grid chains them."""
        home = weight.device
        weight, columns = _where_rounded(weight, grid, params)
        place = weight.device
        if rows is not None:
            columns.weigh_rows(rows.to(place))
        output_factor = None if output_hessian is None else self._output_factor(output_hessian, weight, columns)
        if self.order == "static":
            order, fitted = hessian.order().to(place), None
        else:
            order, fitted = torch.arange(weight.shape[1], device=place), refit.to(place)
        codes = round_columns(weight.T[order], factor.upper.to(place), columns, order, fitted, output_factor)
        return codes.to(home), {name: param.to(home) for name, param in columns.params.items()}


def _where_rounded(weight: Tensor, grid: Grid, params: Params) -> tuple[Tensor, Columns]:
    """weight[O, I] and its columns where they lie, or on the CPU if only there a block of them is rounded in one call:
    a GPU then takes several launches for each column, which is longer than copying all of them there and back."""
    shape = (weight.shape[0], weight.shape[1])
    columns = grid.columns(params, shape)
    if weight.device.type == "cpu" or whole_block(weight, columns) is not None:
        return weight, columns
    here = weight.cpu(), grid.columns({name: param.cpu() for name, param in params.items()}, shape)
    return here if whole_block(*here) is not None else (weight, columns)


def _relative_errors(
    weight: Tensor, results: tuple[Tensor, ...], hessian: Hessian, order: Tensor | None, output_hessian: Tensor | None
) -> list[float]:
    """The mean square of the output error of each of `results`[O, I], relative to the output of weight[O, I]."""
    H = hessian.matrix if order is None else hessian.matrix[order[:, None], order]
    every = max(1, len(weight) // REPORTED_ROWS)
    norm = _output_norm(weight, H, output_hessian, every) or 1.0
    return [_output_norm(result - weight, H, output_hessian, every) / norm for result in results]


def _output_norm(w: Tensor, H: Tensor, output_hessian: Tensor | None, every: int) -> float:
    """tr(K w H wᵀ) of w[O, I], summed over heads: proportional to the mean square of the output. Of the trace, only the
    terms of `every` so many rows of a head."""
    heads = w[None] if output_hessian is None else w.view(len(output_hessian), -1, w.shape[1])
    some = heads[:, ::every]
    left = some if output_hessian is None else output_hessian[:, ::every] @ heads
    return float((some @ H).mul_(left).sum())
