"""bitsandbytes' kernels for NF4 and FP4.

On a CPU its C routine decodes the weight, and torch multiplies: exact, and much faster than decoding in torch. Its
fused CPU product is never used, because it computes in bfloat16 whatever the activations are. Its routine also
takes a wrong scale on CPUs with AVX-512 where a block crosses rows, and falls back to a compiled graph for long
blocks and odd rows; so it is always shown the weight as whole blocks of at most 1024, one a row. On CUDA its
matrix product runs where no block crosses a row.
"""

from __future__ import annotations

from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from neoquant import packing
from neoquant.grids import NESTED_GROUP, Codebook, Grid, double_quant_table, load_bitsandbytes
from neoquant.kernels.base import Kernel, State, look_up, require_ids
from neoquant.tensor import QuantizedTensor

DECODED = (torch.float32, torch.float16, torch.bfloat16)
LONGEST_BLOCK = 1024  # the longest that bitsandbytes' C routine decodes itself


class Bitsandbytes(Kernel):
    """State: `packed`, the codes two a byte, high half first, as bitsandbytes stores them, and the parameters."""

    name: ClassVar[str] = "bitsandbytes"

    def refuse(self, grid: Grid, shape: tuple[int, ...], device: torch.device, ordered: bool = False) -> str | None:
        if not isinstance(grid, Codebook):
            return f"bitsandbytes multiplies exactly with nf4 and fp4 only, not {grid.name}"
        if ordered:
            return "bitsandbytes knows no activation order"
        if device.type not in ("cpu", "cuda"):
            return f"there are kernels for cpu and cuda, not {device.type}"
        return _lacking(device.type)

    def pack(self, q: QuantizedTensor) -> State:
        assert isinstance(q.grid, Codebook)
        return {"packed": packing.pack_nibbles(q.codes.reshape(-1), pad=q.grid.zero_code), **q.params}

    def unpack(self, state: State, grid: Grid, shape: tuple[int, ...], dtype: torch.dtype) -> QuantizedTensor:
        codes = packing.unpack_nibbles(state["packed"], shape[0] * shape[1]).view(shape)
        return QuantizedTensor(codes, grid, {name: state[name] for name in grid.param_shapes(shape)}, dtype=dtype)

    def linear(self, x: Tensor, state: State, grid: Grid, shape: tuple[int, ...], bias: Tensor | None) -> Tensor:
        assert isinstance(grid, Codebook)
        if x.is_cuda and x.dtype in DECODED and shape[1] % grid.block_size == 0:
            return _cuda_linear(x, state, grid, shape, bias)
        return torch.nn.functional.linear(x, decode(state, grid, shape, x.dtype), bias)

    def embedding(self, ids: Tensor, state: State, grid: Grid, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        require_ids(ids, shape[0])
        codes = packing.take_nibbles(state["packed"], ids.reshape(-1), shape[1])
        return look_up(ids, codes, state, grid, shape, dtype)


def decode(state: State, grid: Codebook, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The weight, dtype[O, I], by bitsandbytes' C routine; the last, short block by torch."""
    if dtype not in DECODED:
        return decode(state, grid, shape, torch.float32).to(dtype)
    n, block = shape[0] * shape[1], min(grid.block_size, LONGEST_BLOCK)
    whole = n // grid.block_size
    body, absmax = whole * grid.block_size, grid.scales(state)
    scales = absmax[:whole].repeat_interleave(grid.block_size // block)
    load_bitsandbytes()  # defines the operation
    w: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        state["packed"][: body // 2], scales, block, grid.kind, (body // block, block), dtype
    )
    if body < n:
        codes = packing.unpack_nibbles(state["packed"][body // 2 :], n - body)
        rest = grid.table(codes.device).index_select(0, codes.int()).mul_(absmax[-1])
        w = torch.cat([w.view(-1), rest.to(dtype)])
    return w.view(shape)


def _cuda_linear(x: Tensor, state: State, grid: Codebook, shape: tuple[int, ...], bias: Tensor | None) -> Tensor:
    bnb = load_bitsandbytes()
    quant_state = bnb.functional.QuantState(
        absmax=state["absmax"], shape=torch.Size(shape), code=grid.table(x.device),
        blocksize=grid.block_size, quant_type=grid.kind, dtype=x.dtype,
    )  # fmt: skip
    if grid.double_quant and _takes_nested_scales():
        quant_state.nested, quant_state.offset = True, state["nested_offset"]
        quant_state.state2 = bnb.functional.QuantState(
            absmax=state["nested_absmax"], code=double_quant_table(x.device), blocksize=NESTED_GROUP,
            dtype=torch.float32,
        )  # fmt: skip
    elif grid.double_quant:
        quant_state.absmax = grid.scales(state)
    y: Tensor = bnb.matmul_4bit(x, state["packed"].unsqueeze(1), quant_state=quant_state, bias=bias)
    return y


@cache
def _lacking(device: str) -> str | None:
    """What bitsandbytes lacks to run there with its compiled library; without it, it falls back to torch graphs."""
    try:
        extension = load_bitsandbytes().cextension
    except ModuleNotFoundError:
        return "bitsandbytes is not installed"
    if isinstance(extension.lib, extension.ErrorHandlerMockBNBNativeLibrary):
        return "bitsandbytes' library is not available on this machine"
    if device == "cuda" and torch.cuda.is_available() and not extension.lib.compiled_with_cuda:
        return "bitsandbytes found its library for CPUs only, and none for this CUDA (python -m bitsandbytes says more)"
    return None


@cache
def _takes_nested_scales() -> bool:
    """Whether the product takes doubly quantized scales as they are stored, in one launch: from 0.50 on."""
    load_bitsandbytes()
    return hasattr(torch.ops.bitsandbytes, "gemm_4bit")
