"""The Hessian of a layer's output error, the Cholesky factor of its inverse, and the same for the rows of heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from neoquant.errors import FormatError, RequestError

STRIP = 256  # columns of a matrix of which only one triangle is computed
TALL_STRIP = 1024  # rows of it that are multiplied together
LEGAL_DAMPING = "legal is more than 0, at most 1 (a part of the mean diagonal)"
MAX_TRIES = 4  # at a positive definite Hessian; each raises the damping tenfold


@dataclass(frozen=True)
class Factor:
    """`upper`[I, I] with H**-1 = upperᵀ upper, for H damped and permuted."""

    upper: Tensor
    damping: float  # part of the mean diagonal that was added, perhaps more than asked for
    double: bool  # whether single precision failed
    retries: int  # how often the damping was raised


class Hessian:
    """H = 2 / n * sum of x xᵀ over the n inputs x[I] that were added: of the squared output error, for each row.

    The `H` of GPTQ (Frantar et al., arXiv:2210.17323, section 3). Layers that share their inputs (q, k, v) share one;
    the factor is then computed once.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.columns, self.rows = columns, 0
        self._sum = torch.zeros(columns, columns, device=device)  # its upper triangle
        self._factors: dict[tuple[bool, float], Factor] = {}

    def add(self, x: Tensor, checked: bool = True) -> None:
        """Add inputs x[..., I]. Raises FormatError if they are of another width, or not finite, unless that is left to
        `require_finite`: it waits for a GPU."""
        if x.shape[-1] != self.columns:
            raise FormatError(f"the layer has {self.columns} inputs, got {x.shape[-1]}")
        x = x.detach().reshape(-1, self.columns).float()
        self.rows += len(x)
        self._factors.clear()
        for start in range(0, self.columns, STRIP):
            stop = min(start + STRIP, self.columns)
            self._sum[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])
        if checked:
            self.require_finite()

    def add_up(self, total: Callable[[Tensor], Tensor]) -> None:
        """Let it be that of all processes' inputs; `total` is the sum over them."""
        self._sum = total(self._sum)
        self.rows = int(total(torch.tensor(self.rows)))
        self._factors.clear()
        self.require_finite()

    def require_finite(self, *others: Hessian) -> None:
        """Raise FormatError if some input that was added, here or to `others`, was not finite, or its square is not."""
        total = self._sum.diagonal().sum()
        for other in others:
            total = total + other._sum.diagonal().sum()
        if not bool(total.isfinite()):
            raise FormatError("the layer's inputs hold infinity or NaN, or are too large to be squared")

    @property
    def matrix(self) -> Tensor:
        """H, float32[I, I], without damping."""
        H = self._sum.clone()
        for start in range(0, self.columns, STRIP):
            stop = min(start + STRIP, self.columns)
            H[stop:, start:stop] = H[start:stop, stop:].T
            corner = H[start:stop, start:stop]
            corner.copy_(corner.triu() + corner.triu(1).T)
        return H.mul_(2 / max(1, self.rows))

    @property
    def diagonal(self) -> Tensor:
        """Of H, float32[I]: the weight of each input."""
        return self._sum.diagonal() * (2 / max(1, self.rows))

    def order(self) -> Tensor:
        """Inputs by descending diagonal, int64[I] (the activation order of GPTQ's `act-order`); ties keep theirs."""
        return self.diagonal.argsort(descending=True, stable=True)

    def factor(self, ordered: bool, damping: float) -> Factor:
        """See `Factor`; `ordered` permutes the inputs by `order()`. Cached until more inputs are added.

        Dead inputs, which were always zero, are given the mean diagonal: their weights are rounded to nearest, and
        compensate nothing. Raises RequestError if damping does not make H positive definite.
        """
        if not 0 < damping <= 1:
            raise RequestError(f"damping {damping}: {LEGAL_DAMPING}")
        if (ordered, damping) not in self._factors:
            H, diagonal = self.matrix, self.diagonal
            mean = float(diagonal.mean()) or 1.0
            H.diagonal()[diagonal == 0] = mean
            if ordered:
                reverse = self.order().flip(0)
                H = H[reverse[:, None], reverse]
            else:
                H = H.flip(0, 1)
            self._factors[ordered, damping] = _factor(H, mean, damping)
        return self._factors[ordered, damping]

    def solve(self, missing: Tensor, ordered: bool, damping: float) -> Tensor:
        """missing[O, I] times the inverse of H, damped: by the factor of `factor`, which GPTQ needs as well."""
        upper = self.factor(ordered, damping).upper
        if not ordered:
            return _times_triangles(missing, upper)
        order, solved = self.order(), torch.empty_like(missing)
        solved[:, order] = _times_triangles(missing[:, order], upper)
        return solved


@dataclass(frozen=True)
class OutputFactor:
    """How an error in one row of a head is compensated in those that are not rounded yet; all rows may be one head.

    It follows from the output Hessian K[D, D] of each head: with a weight error E[O, I], the error of the attention
    output, or the loss, is the sum over heads of tr(K E H Eᵀ). Errors are therefore compensated along rows with the
    factor of K as they are along columns with that of H, since a Kronecker product's factor is that of its factors
    (two-sided compensation: Tseng et al., arXiv:2505.22988).

    unit       [heads, D, D]: an error e in the i-th row subtracts unit[i, k] * e from the k-th, k > i.
    row_order  int64[heads, D]: which of a head's rows is the i-th; those of the largest diagonal come first.
    """

    unit: Tensor
    row_order: Tensor

    @property
    def size(self) -> int:
        """Rows of a head."""
        return self.row_order.shape[1]

    def to(self, device: torch.device) -> OutputFactor:
        """The same on another device."""
        return OutputFactor(self.unit.to(device), self.row_order.to(device))

    @staticmethod
    def of(output_hessian: Tensor, damping: float) -> OutputFactor:
        """Of K, float32[heads, D, D], damped as H is."""
        units, orders = [], []
        for K in output_hessian:
            order = K.diagonal().argsort(descending=True, stable=True)
            upper = _output_factor(K, order, damping)
            units.append(upper / upper.diagonal()[:, None])
            orders.append(order)
        return OutputFactor(torch.stack(units), torch.stack(orders))


@dataclass(frozen=True)
class SpanFactor:
    """The same where rows must be rounded in their natural order, `span` of them together, as on a trellis. What rows
    of different spans have in common is left out.

    unit   [spans, span, span]: an error in row i of a span subtracts unit[i, k] of it from row k > i; zeros beyond O.
    price  [O]: what a row's squared error costs when all that it leads to in later rows of its span is compensated.
    """

    unit: Tensor
    price: Tensor

    @staticmethod
    def of(output_hessian: Tensor, span: int, damping: float) -> SpanFactor:
        """Of K, float32[heads, D, D] with heads * D = O, damped as H is."""
        heads, D, _ = output_hessian.shape
        units, prices = [], []
        for start in range(0, heads * D, span):
            stop = min(start + span, heads * D)
            K = output_hessian.new_zeros(stop - start, stop - start)
            for head in range(start // D, (stop - 1) // D + 1):
                low, high = max(start, head * D), min(stop, (head + 1) * D)
                here, there = slice(low - start, high - start), slice(low - head * D, high - head * D)
                K[here, here] = output_hessian[head, there, there]
            upper = _output_factor(K, torch.arange(len(K), device=K.device), damping)
            unit = K.new_zeros(span, span)
            unit[: len(K), : len(K)] = upper / upper.diagonal()[:, None]
            units.append(unit)
            prices.append(upper.diagonal().square().reciprocal())
        return SpanFactor(torch.stack(units), torch.cat(prices))


def _output_factor(K: Tensor, order: Tensor, damping: float) -> Tensor:
    """Upper triangular U[D, D] with K**-1 = Uᵀ U, for K[D, D] damped, its rows and columns in `order`."""
    filled, reverse, diagonal = K.clone(), order.flip(0), K.diagonal()
    mean = float(diagonal.mean()) or 1.0
    filled.diagonal()[diagonal == 0] = mean
    return _factor(filled[reverse[:, None], reverse], mean, damping).upper


def diagonal_pieces(output_hessian: Tensor, size: int) -> Tensor:
    """The blocks of so many rows on the diagonal of K[heads, D, D], as heads of their own; K itself if they are few, or
    `size` does not divide them."""
    heads, D, _ = output_hessian.shape
    if 4 * size >= D or D % size:
        return output_hessian
    blocks = output_hessian.view(heads, D // size, size, D // size, size).diagonal(dim1=1, dim2=3)
    return blocks.movedim(-1, 1).reshape(-1, size, size)


def _times_triangles(x: Tensor, upper: Tensor) -> Tensor:
    """x[O, I] upperᵀ upper, without multiplying by the zeros below the diagonal."""
    strips = [slice(start, min(start + TALL_STRIP, len(upper))) for start in range(0, len(upper), TALL_STRIP)]
    x = torch.cat([x[:, strip.start :] @ upper[strip, strip.start :].T for strip in strips], 1)
    return torch.cat([x[:, : strip.stop] @ upper[: strip.stop, strip] for strip in strips], 1)


def _factor(reversed_hessian: Tensor, mean: float, damping: float) -> Factor:
    """Of H, float32[I, I] with its rows and columns reversed; H is overwritten."""
    diagonal = reversed_hessian.diagonal().clone()
    for retries in range(MAX_TRIES):
        for dtype in (torch.float32, torch.float64):
            damped = reversed_hessian.to(dtype)
            damped.diagonal().copy_(diagonal.to(dtype) + damping * mean)
            upper = inverse_factor(damped)
            if upper is not None:
                return Factor(upper.float(), damping, dtype == torch.float64, retries)
        damping *= 10
    raise RequestError(f"the inputs' Hessian is not positive definite, even with damping {damping / 10:g}")


def inverse_factor(reversed_hessian: Tensor) -> Tensor | None:
    """Upper triangular U[I, I] with H**-1 = Uᵀ U, in the memory of H, which is given with its rows and columns
    reversed; or None, and H unchanged, if it is not positive definite in its precision.

    A Cholesky factor of the reversed H, reversed again, is R with H = R Rᵀ, and U = R**-1: one factor and one
    triangular inverse, where inverting H first takes two of each. The largest matrix takes 268 MB at 1.3B, so there is
    only one beside this one at any time.
    """
    lower, info = torch.linalg.cholesky_ex(reversed_hessian)
    if int(info) or not bool(lower.diagonal().reciprocal().sum().isfinite()):  # the diagonal that U will have
        return None
    upper = reversed_hessian
    for start in range(0, len(upper), STRIP):
        upper[start : start + STRIP] = lower[max(0, len(upper) - start - STRIP) : len(upper) - start].flip(0, 1)
    del lower
    _invert_triangle(upper)
    return upper


def _invert_triangle(upper: Tensor) -> None:
    """Invert an upper triangular matrix in place, one strip of columns after the other: with the inverse A of the part
    to the left, [B; C] becomes [-A B C**-1; C**-1]."""
    for start in range(0, len(upper), STRIP):
        stop = min(start + STRIP, len(upper))
        corner = upper[start:stop, start:stop]
        one = torch.eye(stop - start, dtype=corner.dtype, device=corner.device)
        corner.copy_(torch.linalg.solve_triangular(corner, one, upper=True))
        above = upper[:start, start:stop] @ corner
        for top in range(0, start, TALL_STRIP):  # left of A's diagonal is zero
            bottom = min(top + TALL_STRIP, start)
            upper[top:bottom, start:stop] = (upper[top:bottom, top:start] @ above[top:]).neg_()
