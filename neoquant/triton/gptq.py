"""GPTQ on the columns of one block, in one launch. Every tensor is on the GPU; the caller sees to shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neoquant.native.gptq import Heads, Levels
from neoquant.triton import running

LANES = 32  # rows of a program, where they are not coupled
LARGEST_HEAD = 1024


def refuse() -> str | None:
    """Why no program of Triton can round columns, or None."""
    return running.lacking()


def round_columns(
    weights: Tensor, upper: Tensor, levels: Levels, columns: Tensor, heads: Heads | None, codes: Tensor
) -> Tensor:
    """As `native.gptq.round_columns`, to the bit, but for int8 rows too; a head has LARGEST_HEAD rows at most."""
    from neoquant.triton import gptq_program

    n, rows = weights.shape
    errors = torch.empty_like(weights)
    coupled = heads is not None
    unit, row_order, original = (upper, columns, weights) if heads is None else heads
    head = LANES if heads is None else heads.row_order.shape[1]
    lanes = running.power_of_two(head)
    absent = levels.scale
    arguments: dict[str, Any] = {
        "weights": weights, "original": original, "upper": upper, "places": columns,
        "scale": levels.scale, "inverse": levels.inverse, "zero": absent if levels.zero is None else levels.zero,
        "bounds": absent if levels.bounds is None else levels.bounds,
        "order": absent if levels.order is None else levels.order,
        "table": absent if levels.table is None else levels.table,
        "unit": unit, "row_order": row_order, "lacking": torch.empty_like(weights) if coupled else weights,
        "codes": codes, "errors": errors, "n": n, "rows": rows, "stride": upper.stride(0), "width": levels.width,
        "head": head, "KIND": 0 if levels.zero is not None else 1 if levels.bounds is not None else 2,
        "TOP": float(levels.top), "COUPLED": coupled, "LANES": lanes,
    }  # fmt: skip
    # A thread has one lane, and reads what it wrote itself; coupled rows read each other's, and wait for each other.
    # A product and a difference that are rounded once would differ from the CPU's in the last bit.
    options = {"num_warps": min(8, max(1, lanes // 32)), "enable_fp_fusion": False}
    running.run(gptq_program.round_columns, (-(-rows // head),), arguments, options)
    return errors
