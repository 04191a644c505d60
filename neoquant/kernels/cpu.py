"""The native library's kernels, for any grid it knows, on CPUs.

Few rows of activations (generating) are multiplied with the packed weight as it lies, in float32 whatever their type:
every byte of the weight is read once. Many rows (prefill, evaluation) are multiplied by torch, in their own type,
with a piece of the weight at a time: a large weight is never decoded whole, a small one at once, since every piece
costs a meeting of the threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from neoquant import bits, native
from neoquant.grids import Codebook, Grid, Int8Rows, double_quant_table
from neoquant.kernels.base import Kernel, State, look_up, require_ids
from neoquant.native import products
from neoquant.tensor import QuantizedTensor

FEW = 8  # rows up to which the packed product is the faster one
PIECE = 1 << 22  # weights decoded at once: 16 MiB


class Cpu(Kernel):
    """State: `packed` (NF4 and FP4: two codes a byte, high half first) or `codes` (int8), parameters, `order`."""

    name: ClassVar[str] = "cpu"

    def refuse(self, grid: Grid, shape: tuple[int, ...], device: torch.device, ordered: bool = False) -> str | None:
        if not isinstance(grid, Codebook | Int8Rows):
            return f"the native library knows nf4, fp4 and int8, not {grid.name}"
        if device.type != "cpu":
            return f"the native library runs on the CPU, not on {device.type}"
        active = native.active()
        return active.reason if active.library is None else None

    def pack(self, q: QuantizedTensor) -> State:
        state = dict(q.params) if q.order is None else {**q.params, "order": q.order}
        if isinstance(q.grid, Codebook):
            return {"packed": bits.pack_nibbles(q.codes.reshape(-1), pad=q.grid.zero_code), **state}
        return {"codes": q.codes.contiguous().view(torch.int8), **state}

    def unpack(self, state: State, grid: Grid, shape: tuple[int, ...], dtype: torch.dtype) -> QuantizedTensor:
        codes = (
            bits.unpack_nibbles(state["packed"], shape[0] * shape[1]).view(shape)
            if isinstance(grid, Codebook)
            else state["codes"].view(torch.uint8)
        )
        params = {name: state[name] for name in grid.param_shapes(shape)}
        return QuantizedTensor(codes, grid, params, state.get("order"), dtype)

    def linear(self, x: Tensor, state: State, grid: Grid, shape: tuple[int, ...], bias: Tensor | None) -> Tensor:
        if "order" in state:
            x = x.index_select(-1, state["order"])
        w = _weight(state, grid, shape)
        rows = x.reshape(-1, shape[1])
        product: Callable[..., Tensor] = _Product.apply if torch.is_grad_enabled() and x.requires_grad else _product
        return product(rows, w, bias).view(*x.shape[:-1], shape[0])

    def embedding(self, ids: Tensor, state: State, grid: Grid, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        require_ids(ids, shape[0])
        rows = ids.reshape(-1)
        codes = (
            bits.take_nibbles(state["packed"], rows, shape[1])
            if isinstance(grid, Codebook)
            else state["codes"][rows].view(torch.uint8)
        )
        return look_up(ids, codes, state, grid, shape, dtype)


class _Product(torch.autograd.Function):
    """The product, with the gradient of x; the weight has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: products.Weight, bias: Tensor | None) -> Tensor:
        ctx.weight = w
        return _product(x, w, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        total = torch.zeros(grad.shape[0], ctx.weight.columns, dtype=grad.dtype)
        for start, piece in _pieces(ctx.weight, grad.dtype):
            total.addmm_(grad[:, start : start + len(piece)], piece)
        return total, None, None


def _weight(state: State, grid: Grid, shape: tuple[int, ...]) -> products.Weight:
    if not isinstance(grid, Codebook):
        return products.int8_rows(state["codes"], state["scb"], shape)
    nested = (state["nested_absmax"], double_quant_table(_CPU), state["nested_offset"]) if grid.double_quant else None
    return products.codebook(state["packed"], grid.table(_CPU), state["absmax"], nested, grid.block_size, shape)


def _product(x: Tensor, w: products.Weight, bias: Tensor | None) -> Tensor:
    """x[M, I] times the weight's transpose, plus bias[O], in x's type."""
    if x.shape[0] <= FEW and x.dtype != torch.float64:
        return products.multiply(x.float(), w, None if bias is None else bias.float()).to(x.dtype)
    y = torch.empty(x.shape[0], w.rows, dtype=x.dtype)
    for start, piece in _pieces(w, x.dtype):
        torch.mm(x, piece.T, out=y[:, start : start + len(piece)])
    return y if bias is None else y.add_(bias)


def _pieces(w: products.Weight, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """The weight's rows, dtype[n, I], piece by piece, each with the number of its first row; one buffer for all."""
    step = max(1, min(w.rows, PIECE // w.columns))
    buffer = torch.empty(step, w.columns)
    for start in range(0, w.rows, step):
        piece = buffer[: min(step, w.rows - start)]
        products.decode(w, start, piece)
        yield start, piece.to(dtype)


_CPU = torch.device("cpu")
