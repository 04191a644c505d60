"""The calibration samples that one of several processes runs through the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from neoquant.calibration.memory import gradient_rows
from neoquant.distributed import SINGLE_PROCESS, ProcessGroup


@dataclass(frozen=True)
class Share:
    """One process's samples: a stretch of those that the unquantized model sees, then one of the others.

    ids      int64[R, T], its samples; R may be 0
    numbers  theirs among the samples of all processes, ascending
    first    how many of them the unquantized model sees
    rows     of all processes
    firsts   and how many of those the unquantized model sees
    group    the processes
    """

    ids: Tensor
    numbers: Sequence[int]
    first: int
    rows: int
    firsts: int
    group: ProcessGroup = SINGLE_PROCESS

    @staticmethod
    def of(ids: Tensor, group: ProcessGroup = SINGLE_PROCESS) -> Share:
        """This process's share of samples ids[R, T]; of one process all of them."""
        rows, length = ids.shape
        firsts = gradient_rows(rows, length)
        if group.size == 1:
            return Share(ids, range(rows), firsts, rows, firsts)
        first = group.share(firsts)
        numbers = [*first, *(firsts + number for number in group.share(rows - firsts))]
        return Share(ids[numbers], numbers, len(first), rows, firsts, group)

    @property
    def first_ids(self) -> Tensor:
        """int64[first, T]: the samples that the unquantized model sees."""
        return self.ids[: self.first]

    @property
    def first_numbers(self) -> Sequence[int]:
        """Theirs among the samples of all processes."""
        return self.numbers[: self.first]
