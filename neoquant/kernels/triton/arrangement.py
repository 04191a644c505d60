"""A weight as the programs see it: constants by what its grid's `Decoding` states, and the tensors of its state."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from neoquant.grids import Grid
from neoquant.grids.decoding import tensor_of
from neoquant.kernels.base import State
from neoquant.packing import row_bytes

UNITS = {2: (1, 4), 3: (3, 8), 4: (1, 2), 8: (1, 1)}  # bits -> bytes of a unit, codes in it
LARGEST = 1 << 31  # places in a weight that are counted in 32 bits


@dataclass(frozen=True)
class Arrangement:
    """The constants of `programs`, and what a launch needs to know beside them.

    aligned     no group crosses a row, so that products run
    row_bytes   of the codes of one row
    groups      of one row
    """

    constants: tuple[tuple[str, int | float | bool], ...]
    aligned: bool
    row_bytes: int
    groups: int
    codes: str
    scale: str
    zero: str | None
    nested: tuple[str, str] | None
    scale_table: tuple[float, ...] | None
    numbers: tuple[float, ...] | None

    @property
    def group(self) -> int:
        """Inputs that share a scale; 0: a whole row."""
        return int(dict(self.constants)["GROUP"])

    def tensors(self, state: State) -> dict[str, Tensor]:
        """The programs' arguments that describe a weight; what it does not have is stood in for, and never read."""
        packed = state[self.codes].view(torch.uint8)
        scale, device = state[self.scale], packed.device
        coarse, offset = (scale, scale) if self.nested is None else (state[name] for name in self.nested)
        return {
            "order": state.get("order", packed),
            "packed": packed,
            "scale": scale,
            "coarse": coarse,
            "offset": offset,
            "scale_table": scale if self.scale_table is None else tensor_of(self.scale_table, device),
            "zero": packed if self.zero is None else state[self.zero],
            "numbers": scale if self.numbers is None else tensor_of(self.numbers, device),
        }


@lru_cache(maxsize=1 << 12)
def arrange(grid: Grid, shape: tuple[int, ...], codes: str) -> Arrangement:
    """Of a weight [N, K] whose codes are packed as `native_weight` packs them, under the name `codes`.

    The grid is one that `native_weight.refuse` does not refuse.
    """
    decoding, scale = grid.decoding, grid.decoding.scale
    unit, in_unit = UNITS[decoding.bits]
    width, K = decoding.width(shape[1]), shape[1]
    is_whole_row = not decoding.flat and width == K
    high = decoding.table is not None  # nibbles over the flattened weight, the first in the high half
    constants = {
        "BITS": decoding.bits,
        "UNIT": unit,
        "CODES": in_unit,
        "HIGH": high,
        "TABLE": decoding.table is not None,
        "SIGNED": decoding.signed,
        "MIDDLE": 0 if decoding.zero is not None or decoding.table is not None else decoding.middle,
        "GROUP": 0 if is_whole_row else width,
        "SCALING": 0 if scale.table is None else 1 if scale.nested is None else 2,
        "FACTOR": float(scale.factor),
        "ZERO": decoding.zero is not None,
    }
    aligned = (not decoding.flat or K % width == 0) and (not high or K % 2 == 0)
    return Arrangement(
        tuple(constants.items()), aligned, row_bytes(K, decoding.bits), 1 if is_whole_row else -(-K // width), codes,
        scale.param, decoding.zero, scale.nested, scale.table, decoding.table,
    )  # fmt: skip
