"""Products in integers by Triton's programs, with activations rounded to int8 as `kernels.rounded` says."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from neoquant.grids import Grid
from neoquant.grids.decoding import Decoding
from neoquant.kernels.rounded import SMALLEST, run_length
from neoquant.kernels.triton.kernel import COMPUTED, Triton
from neoquant.kernels.triton.launch import WARPS, PackedWeight
from neoquant.triton import running

LEAST_CAPABILITY = (8, 0)  # before it, tl.dot of int8 is not compiled
LEAST_RUN = 16
ROUNDED = 1024  # inputs of a row that a program rounds
LEAST_INPUTS = 32  # of a product of integers on tensor cores


class TritonInt8(Triton):
    """State: as `Triton` holds it. A product of any number of rows is two launches: rounding them, multiplying."""

    name: ClassVar[str] = "triton-int8"
    activations: ClassVar[str] = "int8"

    def refuse(self, grid: Grid, shape: tuple[int, ...], device: torch.device, ordered: bool = False) -> str | None:
        if reason := super().refuse(grid, shape, device, ordered):
            return reason
        if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
            return f"Triton multiplies in integers from compute capability {'.'.join(map(str, LEAST_CAPABILITY))} on"
        if run_length(grid, shape[1]) < LEAST_RUN:
            return f"blocks of {grid.name} cross rows of {shape[1]}, which Triton's kernels do not multiply in integers"
        return None

    def _product(self, x: Tensor, weight: PackedWeight, grid: Grid, bias: Tensor | None) -> Tensor:
        if x.dtype not in COMPUTED:
            return multiply(x.float(), weight, grid, bias).to(x.dtype)
        return multiply(x, weight, grid, bias)


def multiply(x: Tensor, weight: PackedWeight, grid: Grid, bias: Tensor | None) -> Tensor:
    """x[M, K], rounded, times the transpose of a weight [N, K], plus bias[N]: [M, N] in x's type."""
    from neoquant.kernels.triton import rounded_programs

    arrangement, (N, K), M, device = weight.arrangement, weight.shape, x.shape[0], x.device
    y, run = torch.empty(M, N, dtype=x.dtype, device=device), run_length(grid, K)
    if M == 0:
        return y
    runs = -(-K // run)
    steps = torch.empty(M, K, dtype=torch.int8, device=device)
    sizes, sums = torch.empty(2, M, runs, device=device)
    order = weight.state.get("order")
    rounding: dict[str, Any] = {
        "x": x.contiguous(), "order": steps if order is None else order, "steps": steps, "sizes": sizes, "sums": sums,
        "K": K, "runs": runs, "SMALLEST": SMALLEST, "ORDER": order is not None, "RUN": run,
        "RUNS": min(ROUNDED // run, running.power_of_two(runs)),
    }  # fmt: skip
    options = {"num_warps": WARPS, "enable_fp_fusion": False}
    running.run(rounded_programs.round_rows, (M, -(-runs // rounding["RUNS"])), rounding, options)
    described, constants = arrangement.tensors(weight.state), dict(arrangement.constants)
    decoding, middle = grid.decoding, constants.pop("MIDDLE")
    levels, step = (steps, 1.0) if decoding.table is None else _levels(decoding, device)
    BM = min(64, max(16, running.power_of_two(M)))
    multiplying: dict[str, Any] = {
        **{name: described[name] for name in ("packed", "scale", "coarse", "offset", "scale_table", "zero")},
        "steps": steps, "sizes": sizes, "sums": sums, "levels": levels, "bias": sizes if bias is None else bias, "y": y,
        "M": M, "N": N, "K": K, "row_bytes": arrangement.row_bytes, "groups": arrangement.groups, "runs": runs,
        **constants, "SHIFT": 128 if decoding.zero is not None and decoding.bits == 8 else middle, "STEP": step,
        "BIAS": bias is not None, "RUN": run, "BM": BM, "BN": 32, "BK": max(LEAST_INPUTS, run),
    }  # fmt: skip
    running.run(rounded_programs.multiply_rounded, (-(-N // 32), -(-M // BM)), multiplying, options)
    return y


@cache
def _levels(decoding: Decoding, device: torch.device) -> tuple[Tensor, float]:
    """`Decoding.levels` on a device."""
    levels, step = decoding.levels()
    return levels.to(device), step
