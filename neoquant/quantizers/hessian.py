"""What a layer's inputs say about its weight: the matrix of their second moments, and its inverse's factor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neoquant.errors import FormatError, RequestError

STRIP = 256  # columns of a matrix of which only one triangle is computed
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
                order = self.order()
                H = H[order[:, None], order]
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
            damped = K.clone()
            damped.diagonal()[diagonal == 0] = mean
            upper = _factor(damped[turn[:, None], turn], mean, damping).upper
            units.append(upper / upper.diagonal()[:, None])
            turns.append(turn)
        return Across(torch.stack(units), torch.stack(turns))


def _factor(H: Tensor, mean: float, damping: float) -> Factor:
    """Of H float32[I, I], which is used up: a copy less, and at 1.3B one takes 268 MB."""
    diagonal = H.diagonal().clone()
    for retries in range(STEPS):
        for dtype in (torch.float32, torch.float64):
            damped = H.to(dtype)
            damped.diagonal().copy_(diagonal.to(dtype) + damping * mean)
            upper = inverse_factor(damped)
            if upper is not None:
                return Factor(upper.float(), damping, dtype == torch.float64, retries)
        damping *= 10
    raise RequestError(f"the inputs' second moments are not positive definite, even with damping {damping / 10:g}")


def inverse_factor(H: Tensor) -> Tensor | None:
    """Upper triangular U with H**-1 = Uᵀ U, or None if H is not positive definite in its precision.

    With rows and columns turned round, H = R Rᵀ for an upper triangular R, and U = R**-1: one Cholesky factor and one
    triangular inverse, where inverting H first takes two of each.
    """
    lower, info = torch.linalg.cholesky_ex(H.flip(0, 1))
    if int(info):
        return None
    turned = lower.flip(0, 1)
    del lower  # a matrix of the largest layers takes 268 MB at 1.3B
    upper = torch.eye(len(H), dtype=H.dtype, device=H.device)
    for start in range(0, len(H), STRIP):  # below the diagonal nothing is to be computed
        stop = min(start + STRIP, len(H))
        strip = upper[:stop, start:stop]
        strip.copy_(torch.linalg.solve_triangular(turned[:stop, :stop], strip, upper=True))
    return upper if bool(upper.diagonal().sum().isfinite()) else None
