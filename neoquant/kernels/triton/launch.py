"""Launching the programs: how large a tile each takes, and how many there are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neoquant.kernels.base import State
from neoquant.kernels.triton.arrangement import Arrangement

FEW, SOME = 4, 64  # rows of activations that `multiply_few` and `multiply_some` take; more meet a decoded weight
ACTIVATIONS = {None: 0, "gelu_new": 1, "gelu_pytorch_tanh": 1}
DECODED = 1024  # columns of a row that a program decodes
WARPS = 4


def multiply(
    x: Tensor,
    state: State,
    arrangement: Arrangement,
    shape: tuple[int, ...],
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x[M, K] times the transpose of an aligned weight [N, K], M up to SOME, plus bias[N]; through `activation` (one of
    ACTIVATIONS); plus residual[M, N]: [M, N] in x's type."""
    from neoquant.kernels.triton import programs

    M, (N, K) = x.shape[0], shape
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    few = M <= FEW
    program = programs.multiply_few if few else programs.multiply_some
    tiles = few_tiles(M) if few else some_tiles(M, arrangement, x.dtype)
    grid = (-(-N // tiles["BN"]), 1 if few else -(-M // tiles["BM"]))
    arguments: dict[str, Any] = {
        "x": x.contiguous(),
        **arrangement.tensors(state),
        "bias": x if bias is None else bias,
        "residual": x if residual is None else residual.contiguous(),
        "y": y,
        "M": M,
        "N": N,
        "K": K,
        "row_bytes": arrangement.row_bytes,
        "groups": arrangement.groups,
        **dict(arrangement.constants),
        "ORDER": "order" in state,
        "BIAS": bias is not None,
        "ACTIVATION": ACTIVATIONS[activation],
        "RESIDUAL": residual is not None,
        **tiles,
    }
    run(program, grid, arguments, {"num_warps": WARPS, "enable_fp_fusion": True})
    return y


def decode(
    state: State, arrangement: Arrangement, shape: tuple[int, ...], dtype: torch.dtype, rows: Tensor | None = None
) -> Tensor:
    """The weight, or its `rows` int64[R], as dtype[R, K]: as `Decoding.decode` gives them, to the bit."""
    from neoquant.kernels.triton import programs

    count, K = (shape[0] if rows is None else rows.numel()), shape[1]
    described = arrangement.tensors(state)
    w = torch.empty(count, K, dtype=dtype, device=described["packed"].device)
    if count == 0:
        return w
    arguments: dict[str, Any] = {
        "rows": described["packed"] if rows is None else rows.contiguous(),
        **described,
        "w": w,
        "K": K,
        "row_bytes": arrangement.row_bytes,
        "groups": arrangement.groups,
        **dict(arrangement.constants),
        "ORDER": "order" in state,
        "ALIGNED": arrangement.aligned,
        "CHOSEN": rows is not None,
        "BK": min(DECODED, power_of_two(K)),
    }
    # a product and a sum that are rounded once would differ from torch's in the last bit
    run(programs.decode, (count, -(-K // arguments["BK"])), arguments, {"num_warps": WARPS, "enable_fp_fusion": False})
    return w


def run(program: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, Any]) -> None:
    """Launch a program; what stands in for a GPU intercepts here."""
    program[grid](**arguments, **options)


def few_tiles(M: int) -> dict[str, int]:
    """For `multiply_few`: as many inputs at once as make about 1,024 codes a program, whole groups or parts of one."""
    BM = power_of_two(M)
    return {"BM": BM, "BN": 8 if BM == 1 else 4, "BK": 256 if BM == 1 else 128}


def some_tiles(M: int, arrangement: Arrangement, dtype: torch.dtype) -> dict[str, int]:
    """For `multiply_some`: a product of tensor cores takes 16 inputs of a plane at least. float32 is not multiplied by
    them, and a larger tile would spill registers."""
    codes = int(dict(arrangement.constants)["CODES"])
    least = 16 * codes
    BK = max(least, min(128, arrangement.group or 64))
    if dtype == torch.float32:
        return {"BM": 16, "BN": 16, "BK": least}
    return {"BM": 16 if M <= 16 else 32 if M <= 32 else 64, "BN": 32, "BK": BK}


def power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << max(0, n - 1).bit_length()
