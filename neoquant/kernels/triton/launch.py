"""Launching the programs: how large a tile each takes, and how many there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neoquant.kernels.base import State
from neoquant.kernels.triton.arrangement import Arrangement
from neoquant.triton import running

FEW, SOME = 4, 64  # rows of activations that `multiply_few` and `multiply_some` take; more meet a decoded weight
ACTIVATIONS = {None: 0, "gelu_new": 1, "gelu_pytorch_tanh": 1}
DECODED = 1024  # columns of a row that a program decodes
WARPS = 4
STRETCH = 256  # positions that one program attends to, at most
ATTENDED = 8192  # numbers of keys that it holds at once
MOST_REGISTERS = 128  # of a thread that attends: left to itself, an older assembler takes fewer and spills two
OF_EACH = ("order", "packed", "scale", "coarse", "offset", "zero")  # of three weights that are multiplied at once


@dataclass(frozen=True)
class PackedWeight:
    """A packed weight [N, K]: a kernel's state, and how the programs see it."""

    state: State
    arrangement: Arrangement
    shape: tuple[int, ...]

    def is_like(self, other: PackedWeight) -> bool:
        """Whether one launch can have both."""
        alike = (self.arrangement, self.shape) == (other.arrangement, other.shape)
        return alike and ("order" in self.state) == ("order" in other.state)


def multiply(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x[M, K] times the transpose of an aligned weight [N, K], M up to SOME, plus bias[N]; through `activation` (one of
    ACTIVATIONS); plus residual[M, N]: [M, N] in x's type."""
    return _launch_product(x, [weight], bias, activation, residual)


def multiply_by_three(x: Tensor, weights: Sequence[PackedWeight]) -> Tensor:
    """x[M, K] times the transposes of three aligned weights alike, M up to SOME: [3, M, N] in x's type."""
    return _launch_product(x, weights, None, None, None)


def _launch_product(
    x: Tensor, weights: Sequence[PackedWeight], bias: Tensor | None, activation: str | None, residual: Tensor | None
) -> Tensor:
    from neoquant.kernels.triton import programs

    arrangement, three = weights[0].arrangement, len(weights) == 3
    M, (N, K) = x.shape[0], weights[0].shape
    y = torch.empty((3, M, N) if three else (M, N), dtype=x.dtype, device=x.device)
    few = M <= FEW
    program = programs.multiply_few if few else programs.multiply_some
    tiles = few_tiles(M) if few else some_tiles(M, arrangement, x.dtype)
    grid = (-(-N // tiles["BN"]), 1 if few else -(-M // tiles["BM"]), len(weights))
    described = [arrangement.tensors(weight.state) for weight in weights]
    others = {f"{name}_{at}": described[at if three else 0][name] for at in (1, 2) for name in OF_EACH}
    arguments: dict[str, Any] = {
        "x": x.contiguous(),
        **described[0],
        **others,
        "bias": x if bias is None else bias,
        "residual": x if residual is None else residual.contiguous(),
        "y": y,
        "M": M,
        "N": N,
        "K": K,
        "row_bytes": arrangement.row_bytes,
        "groups": arrangement.groups,
        **dict(arrangement.constants),
        "ORDER": "order" in weights[0].state,
        "BIAS": bias is not None,
        "ACTIVATION": ACTIVATIONS[activation],
        "RESIDUAL": residual is not None,
        "THREE": three,
        **tiles,
    }
    running.run(program, grid, arguments, {"num_warps": WARPS, "enable_fp_fusion": True})
    return y


def decode(weight: PackedWeight, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
    """The weight, or its `rows` int64[R], as dtype[R, K]: as `Decoding.decode` gives them, to the bit."""
    from neoquant.kernels.triton import programs

    state, arrangement, K = weight.state, weight.arrangement, weight.shape[1]
    count = weight.shape[0] if rows is None else rows.numel()
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
        "BK": min(DECODED, running.power_of_two(K)),
    }
    # a product and a sum that are rounded once would differ from torch's in the last bit
    running.run(
        programs.decode, (count, -(-K // arguments["BK"])), arguments, {"num_warps": WARPS, "enable_fp_fusion": False}
    )
    return w


def attend(qkv: Tensor, keys: Tensor, values: Tensor, position: Tensor, keep: Tensor | None) -> Tensor:
    """Attention of the position that comes next, to itself and to what lies in two rings: [B, H * D] in qkv's type.

    qkv[3, B, H * D] are its query, key and value; keys and values[B, H, S, D], where position p lies at place p modulo
    S; position int64[1] is its number, and where its key and value are written; keep bool[B, C] is False on padding.
    """
    from neoquant.kernels.triton import programs

    B, H, S, D = keys.shape
    splits, BD = running.power_of_two(-(-S // STRETCH)), running.power_of_two(D)
    y = torch.empty_like(qkv[0])
    parts = y if splits == 1 else torch.empty(B * H, splits, 2 + D, device=y.device)
    arguments: dict[str, Any] = {
        "qkv": qkv, "keys": keys, "values": values, "position": position,
        "keep": position if keep is None else keep.contiguous().view(torch.uint8), "y": y, "parts": parts,
        "B": B, "H": H, "D": D, "S": S, "WIDTH": 0 if keep is None else keep.shape[1], "KEEP": keep is not None,
        "SPLITS": splits, "BD": BD, "BS": max(16, ATTENDED // BD),
    }  # fmt: skip
    options = {"num_warps": WARPS, "enable_fp_fusion": True, "maxnreg": MOST_REGISTERS}
    running.run(programs.attend, (B * H, splits), arguments, options)
    if splits > 1:
        joined = {"parts": parts, "y": y, "D": D, "SPLITS": splits, "BD": BD}
        running.run(programs.join_parts, (B * H,), joined, {"num_warps": WARPS, "enable_fp_fusion": True})
    return y


def few_tiles(M: int) -> dict[str, int]:
    """For `multiply_few`: as many inputs at once as make about 1,024 codes a program, whole groups or parts of one."""
    BM = running.power_of_two(M)
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
