"""What a grid is, and the pieces that grids work in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor

from neoquant.errors import FormatError
from neoquant.grids.decoding import CHUNK, LAUNCHED, Decoding
from neoquant.native.gptq import Levels
from neoquant.native.trellis import Paths

Params = dict[str, Tensor]
ParamShapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]

TO_INTEGER = 1.5 * 2**23  # added and taken away, leaves the nearest integer (ties to even); torch.round starts threads


class Grid(ABC):
    """Where values may lie. Subclasses are frozen dataclasses."""

    legal_bits: ClassVar[tuple[int, ...]]
    options: ClassVar[tuple[str, ...]]  # what a user may choose beside bits and type

    @property
    @abstractmethod
    def bits(self) -> int:
        """Of a code."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What a user calls it: a key of `GRIDS`."""

    @property
    def label(self) -> str:
        """The name with what differs from the usual, for names of recipes and folders: `nf4-b128`, `affine4-g64`."""
        return self.name

    @property
    @abstractmethod
    def decoding(self) -> Decoding:
        """How its values follow from codes and parameters: what kernels and JAX run it by."""

    @abstractmethod
    def param_shapes(self, shape: tuple[int, ...]) -> ParamShapes:
        """Name -> (dtype, shape) of the parameters of a weight [O, I]."""

    @abstractmethod
    def nearest(self, w: Tensor) -> tuple[Tensor, Params]:
        """Round w[O, I] to the nearest values, in the field's own convention: (codes uint8[O, I], params).

        Raises FormatError for a weight that holds infinity or NaN.
        """

    @abstractmethod
    def fit(self, w: Tensor, search: bool = False, importance: Tensor | None = None) -> Params:
        """Parameters for w[O, I], already rounded to the type they are stored in.

        With `search`, those of the smallest squared error among some, each input weighted by `importance`[I] where
        given; without, those that cover the range of the weights. int8 rows always cover their range.
        """

    @abstractmethod
    def round(self, w: Tensor, params: Params) -> Tensor:
        """The codes, uint8[O, I], whose values under `params` are nearest to w[O, I]."""

    def decode(self, codes: Tensor, params: Params, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values of `codes`, uint8[O, I]: computed in float32, given as dtype[O, I]."""
        return self.decoding.decode(codes, params, dtype)

    def decode_rows(self, codes: Tensor, params: Params, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Some rows int64[N] only, bit for bit as `decode` gives them: `codes` uint8[N, I] are those of
        `decoding.sources(rows, O)`, which but on a trellis are the rows themselves; N is not 0."""
        return self.decoding.decode_rows(codes, params, rows, dtype)

    @abstractmethod
    def columns(self, params: Params, shape: tuple[int, int]) -> Columns:
        """A weight [O, I] on this grid, one column at a time."""

    def with_scales(self, params: Params, scale: Tensor) -> Params | None:
        """`params` with the scales float32, in the shape in which `decoding.scale` gives them, as they are stored; None
        where scales are no numbers that may be any."""
        return None

    def remark(self, shape: tuple[int, ...]) -> str | None:
        """What a user should know about a weight [O, I] on this grid, or None."""
        return None

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
        """The grid as a JSON object, for headers and records; `grid_from_dict` is the inverse."""
        return {"name": self.name, **asdict(self)}  # type: ignore[call-overload]  # every concrete grid is a dataclass

    @classmethod
    def from_fields(cls, name: str, fields: dict[str, Any]) -> Grid:
        """The grid that `describe` says so of: its `name`, and the other fields.

        Raises RequestError for an illegal value, TypeError for a field that it does not have.
        """
        return cls(**fields)


class Columns(ABC):
    """A weight [O, I] on a grid column by column, for quantizers that correct the later columns for the earlier.

    `params` may be fitted anew group by group, if `width` is not None: so many columns share parameters that no other
    columns have. Otherwise the parameters of all columns hang together.
    """

    width: int | None = None

    def __init__(self, grid: Grid, params: Params, shape: tuple[int, int]) -> None:
        self.grid, self.shape = grid, shape
        self.params = {name: tensor.clone() for name, tensor in params.items()}

    @abstractmethod
    def round(self, j: int, w: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """w[O] in column j to the nearest values: (codes uint8[O], values[O] in w's type).

        With `rows` int64[R], w[R] are those rows of the column only.
        """

    def levels(self) -> Levels | Paths | None:
        """The same for the native library, as views of what `round` uses; None if it cannot be said so."""
        return None

    def weigh_rows(self, weights: Tensor) -> None:
        """Errors of rows count weights[O] against each other; nothing changes where rows are rounded on their own."""
        assert weights.shape == (self.shape[0],)

    def refit(self, start: int, w: Tensor, search: bool, importance: Tensor | None) -> None:
        """Fit the parameters of the group that starts at column `start` to w[O, width or what is left]."""
        assert self.width is not None
        group = start // self.width
        for name, fitted in self.grid.fit(w, search, importance).items():
            self.params[name].view(self.shape[0], -1)[:, group] = fitted.view(-1)
        self._reload(group)

    def _reload(self, group: int) -> None:
        """Take over the changed parameters of a group."""
        raise NotImplementedError(f"{self.grid.name} has no groups of its own")


def spans(n: int) -> Iterator[slice]:
    """Pieces of `n` weights, each whole blocks of every size but for the last."""
    return (slice(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK))


def row_spans(w: Tensor) -> Iterator[slice]:
    """Pieces of the rows of w[O, I]."""
    rows = max(1, (CHUNK if w.device.type == "cpu" else LAUNCHED) // max(1, w.shape[1]))
    return (slice(start, min(start + rows, w.shape[0])) for start in range(0, w.shape[0], rows))


def count_pieces(n: int, size: int) -> int:
    """Pieces of `size` that `n` make, the last perhaps a short one."""
    return -(n // -size)


def require_finite(absmax: Tensor) -> None:
    """Raise FormatError where the scales of a weight show that it is not finite."""
    if not absmax.isfinite().all():
        raise FormatError("the weight holds infinity or NaN, which no grid can hold")
