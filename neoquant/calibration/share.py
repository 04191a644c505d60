"""The calibration samples that one of several processes runs through the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from neoquant.calibration.memory import gradient_rows, unquantized_rows
from neoquant.distributed import SINGLE_PROCESS, ProcessGroup


@dataclass(frozen=True)
class Share:
    """One process's samples: a stretch of those whose gradients are looked at, then one of the others that outputs are
    corrected by, then one of the rest.

    ids            int64[R, T], its samples; R may be 0
    numbers        theirs among the samples of all processes, ascending
    gradients      how many of them gradients are looked at of
    first          how many outputs are corrected by, those included
    rows           of all processes
    all_gradients  and of how many of those gradients are looked at
    group          the processes
    """

    ids: Tensor
    numbers: Sequence[int]
    gradients: int
    first: int
    rows: int
    all_gradients: int
    group: ProcessGroup = SINGLE_PROCESS

    @staticmethod
    def of(ids: Tensor, group: ProcessGroup = SINGLE_PROCESS) -> Share:
        """This process's share of samples ids[R, T]; of one process all of them."""
        rows, length = ids.shape
        gradients, firsts = gradient_rows(rows, length), unquantized_rows(rows, length)
        if group.size == 1:
            return Share(ids, range(rows), gradients, firsts, rows, gradients)
        back = group.share(gradients)
        first = [*back, *(gradients + number for number in group.share(firsts - gradients))]
        numbers = [*first, *(firsts + number for number in group.share(rows - firsts))]
        return Share(ids[numbers], numbers, len(back), len(first), rows, gradients, group)

    @property
    def gradient_numbers(self) -> Sequence[int]:
        """Those among the samples of all processes whose gradients this one looks at."""
        return self.numbers[: self.gradients]
