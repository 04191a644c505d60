"""How other programs spell quantized weights, which no format here reads: known so that none is taken for plain."""

from __future__ import annotations

from collections.abc import Iterable

GIVE_THE_ORIGINAL = "give the model it was made from, in full or half precision"

_MARKS = (
    (".W_q", "hqq"),
    (".weight._data", "optimum-quanto"),
    ("._weight_qdata", "torchao"),
    (".weight_scales", "EETQ"),
    (".weight_scale_inv", "a program for FP8"),
    (".weight_scale", "a program for FP8 or int8"),
    (".weight_scale_2", "a program for FP4"),
)
"""What follows a layer's name where it is quantized, and by what."""


def other_program(names: Iterable[str]) -> str | None:
    """Which tensor of a checkpoint says that it is quantized, and by what; None where none does."""
    for name in names:
        for mark, program in _MARKS:
            if name.endswith(mark) or f"{mark}." in name:
                return f"tensor {name!r} is of a weight quantized by {program}"
    return None
