"""What a layer's inputs say about its weight: the matrix of their second moments, and its inverse's factor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neoquant.errors import FormatError, RequestError

STRIP = 256  # columns of a matrix of which only one triangle is computed
TALL_STRIP = 1024  # rows of it that are multiplied together
LEGAL_DAMPING = "legal is more than 0, at most 1 (a part of the mean diagonal)"
STEPS = 4  # how often the damping is raised tenfold before giving up


@dataclass(frozen=True)
class Factor:
    """`upper`[I, I] with H**-1 = upperᵀ upper, for H damped and in the order asked for."""

    upper: Tensor
    damping: float  # part of the mean diagonal that was added, perhaps more than asked for
    double: bool  # whether single precision failed
    retries: int  # how often the damping was raised


class Hessian:
    """H = 2 / n * sum of x xᵀ over the n inputs x[I] that were added: of the squared output error, for each row.

    Layers that share their inputs (q, k, v) share one; the factor is then computed once.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.columns, self.rows = columns, 0
        self._sum = torch.zeros(columns, columns, device=device)  # its upper triangle
        self._factors: dict[tuple[bool, float], Factor] = {}

    def add(self, x: Tensor) -> None:
        """Take in inputs x[..., I]. Raises FormatError if they are not finite, or of another width."""
        if x.shape[-1] != self.columns:
            raise FormatError(f"the layer has {self.columns} inputs, got {x.shape[-1]}")
        x = x.detach().reshape(-1, self.columns).float()
        self.rows += len(x)
        self._factors.clear()
        for start in range(0, self.columns, STRIP):
            stop = min(start + STRIP, self.columns)
            self._sum[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])
        if not bool(self._sum.diagonal().sum().isfinite()):
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
        """Of H, float32[I]: how much each input counts."""
        return self._sum.diagonal() * (2 / max(1, self.rows))

    def order(self) -> Tensor:
        """Inputs by falling weight, int64[I]; equal ones keep their order."""
        return self.diagonal.argsort(descending=True, stable=True)

    def factor(self, ordered: bool, damping: float) -> Factor:
        """See `Factor`; `ordered` takes the inputs in `order()`. Kept until more inputs come.

        Dead inputs, which were always zero, are given the mean diagonal: their weights are rounded to nearest, and
        nothing is corrected through them. Raises RequestError if damping does not make H positive definite.
        """
        if not 0 < damping <= 1:
            raise RequestError(f"damping {damping}: {LEGAL_DAMPING}")
        if (ordered, damping) not in self._factors:
            H, diagonal = self.matrix, self.diagonal
            mean = float(diagonal.mean()) or 1.0
            H.diagonal()[diagonal == 0] = mean
            if ordered:
                turn = self.order().flip(0)
                H = H[turn[:, None], turn]
            else:
                H = H.flip(0, 1)
            self._factors[ordered, damping] = _factor(H, mean, damping)
        return self._factors[ordered, damping]


@dataclass(frozen=True)
class Across:
    """How the rows of a head hang together: what an error in one is to add to those that are not rounded yet.

    Given are, for each head, the second moments K[size, size] by which errors in its rows meet in the output: with
    error D[O, I], what counts is the sum over heads of tr(K D H Dᵀ), so errors are fed back along rows through the
    factor of K as they are along columns through that of H (a Kronecker product's factor is that of its factors;
    two-sided feedback: Tseng et al., arXiv:2505.22988).

    unit  [heads, size, size]: with an error e in its i-th row, a head's row k > i is to lose unit[i, k] * e.
    turn  int64[heads, size]: which of its rows is the i-th; rows with much weight come first.
    """

    unit: Tensor
    turn: Tensor

    @staticmethod
    def of(moments: Tensor, damping: float) -> Across:
        """Of K, float32[heads, size, size], damped as H is."""
        units, turns = [], []
        for K in moments:
            diagonal = K.diagonal()
            mean = float(diagonal.mean()) or 1.0
            turn = diagonal.argsort(descending=True, stable=True)
            damped, back = K.clone(), turn.flip(0)
            damped.diagonal()[diagonal == 0] = mean
            upper = _factor(damped[back[:, None], back], mean, damping).upper
            units.append(upper / upper.diagonal()[:, None])
            turns.append(turn)
        return Across(torch.stack(units), torch.stack(turns))


def _factor(turned: Tensor, mean: float, damping: float) -> Factor:
    """Of H, float32[I, I] with its rows and columns in reverse, which is used up."""
    diagonal = turned.diagonal().clone()
    for retries in range(STEPS):
        for dtype in (torch.float32, torch.float64):
            damped = turned.to(dtype)
            damped.diagonal().copy_(diagonal.to(dtype) + damping * mean)
            upper = inverse_factor(damped)
            if upper is not None:
                return Factor(upper.float(), damping, dtype == torch.float64, retries)
        damping *= 10
    raise RequestError(f"the inputs' second moments are not positive definite, even with damping {damping / 10:g}")


def inverse_factor(turned: Tensor) -> Tensor | None:
    """Upper triangular U[I, I] with H**-1 = Uᵀ U, in the memory of `turned`, which is H with its rows and columns in
    reverse; or None, and nothing changed, if H is not positive definite in its precision.

    A Cholesky factor of `turned`, turned back, is R with H = R Rᵀ, and U = R**-1: one factor and one triangular
    inverse, where inverting H first takes two of each. Of the largest layers a matrix takes 268 MB at 1.3B, so there is
    but one beside this one at any time.
    """
    lower, info = torch.linalg.cholesky_ex(turned)
    if int(info) or not bool(lower.diagonal().reciprocal().sum().isfinite()):  # the diagonal that U will have
        return None
    upper = turned
    for start in range(0, len(upper), STRIP):
        upper[start : start + STRIP] = lower[max(0, len(upper) - start - STRIP) : len(upper) - start].flip(0, 1)
    del lower
    _invert_triangle(upper)
    return upper


def _invert_triangle(upper: Tensor) -> None:
    """An upper triangular matrix, in place, a strip of columns after the other: behind the inverse A of what is left
    of it and above, [B; C] becomes [-A B C**-1; C**-1]."""
    for start in range(0, len(upper), STRIP):
        stop = min(start + STRIP, len(upper))
        corner = upper[start:stop, start:stop]
        corner.copy_(torch.linalg.solve_triangular(corner, torch.eye(stop - start).to(corner), upper=True))
        above = upper[:start, start:stop] @ corner
        for top in range(0, start, TALL_STRIP):  # what is left of A's diagonal is zero
            bottom = min(top + TALL_STRIP, start)
            upper[top:bottom, start:stop] = (upper[top:bottom, top:start] @ above[top:]).neg_()
