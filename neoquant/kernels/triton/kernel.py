"""The kernel by Triton's programs, for every grid whose `Decoding` fits them, on CUDA devices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from neoquant.grids import Grid
from neoquant.kernels import native_weight
from neoquant.kernels.base import Kernel, State, require_ids
from neoquant.kernels.triton import launch
from neoquant.kernels.triton.arrangement import LARGEST, arrange
from neoquant.kernels.triton.launch import PackedWeight
from neoquant.tensor import QuantizedTensor
from neoquant.triton import running

COMPUTED = (torch.float32, torch.float16, torch.bfloat16)


class Triton(Kernel):
    """State: as `Cpu` holds it: the codes as `native_weight` packs them, parameters, `order` where there is one.

    Few rows of activations, up to `launch.SOME`, meet the packed weight in one launch; for more it is decoded in one
    and torch multiplies. Not yet measured on hardware.
    """

    name: ClassVar[str] = "triton"

    def refuse(self, grid: Grid, shape: tuple[int, ...], device: torch.device, ordered: bool = False) -> str | None:
        if device.type != "cuda":
            return f"Triton's kernels run on CUDA, not on {device.type}"
        if reason := running.lacking():
            return reason
        if shape[0] * shape[1] >= LARGEST:
            return f"Triton's kernels count to {LARGEST - 1:,} weights, not {shape[0] * shape[1]:,}"
        if grid.decoding.trellis is not None:
            return f"Triton's kernels do not run {grid.name}: its values are not decoded code by code"
        return native_weight.refuse(grid, shape, "Triton's kernels do")

    def pack(self, q: QuantizedTensor) -> State:
        state = {**native_weight.pack_codes(q.codes, q.grid), **q.params}
        return state if q.order is None else {**state, "order": q.order}

    def unpack(self, state: State, grid: Grid, shape: tuple[int, ...], dtype: torch.dtype) -> QuantizedTensor:
        params = {name: state[name] for name in grid.param_shapes(shape)}
        codes = native_weight.unpack_codes(state, grid, shape)
        return QuantizedTensor(codes, grid, params, state.get("order"), dtype)

    def linear(self, x: Tensor, state: State, grid: Grid, shape: tuple[int, ...], bias: Tensor | None) -> Tensor:
        weight, rows = packed_weight(state, grid, shape), x.reshape(-1, shape[1])
        product = partial(self._product, weight=weight, grid=grid, bias=bias)
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _PackedProduct.apply(rows, weight, product)  # type: ignore[no-untyped-call]
        else:
            y = product(rows)
        return y.view(*x.shape[:-1], shape[0])

    def _product(self, x: Tensor, weight: PackedWeight, grid: Grid, bias: Tensor | None) -> Tensor:
        """x[M, K] times the weight's transpose, plus bias: [M, N]."""
        if weight.arrangement.aligned and 0 < x.shape[0] <= launch.SOME and x.dtype in COMPUTED:
            return launch.multiply(x, weight, bias)
        return torch.nn.functional.linear(x, _decoded(weight, x.dtype), bias)

    def embedding(self, ids: Tensor, state: State, grid: Grid, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        require_ids(ids, shape[0])
        kind = dtype if dtype in COMPUTED else torch.float32
        rows = launch.decode(packed_weight(state, grid, shape), kind, ids.reshape(-1))
        return rows.to(dtype).view(*ids.shape, shape[1])


def packed_weight(state: State, grid: Grid, shape: tuple[int, ...]) -> PackedWeight:
    """The weight of a state as the programs see it."""
    return PackedWeight(state, arrange(grid, shape, native_weight.codes_name(grid, shape)), shape)


def _decoded(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    return launch.decode(weight, dtype if dtype in COMPUTED else torch.float32).to(dtype)


class _PackedProduct(torch.autograd.Function):
    """The product, with the gradient of x; the weight has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight, product: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.weight = weight
        return product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] @ _decoded(ctx.weight, grads[0].dtype), None, None
