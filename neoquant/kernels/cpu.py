"""The native library's kernels, for every grid, on CPUs.

Few rows of activations (generating) are multiplied with the packed weight as it lies: every byte of it is read once.
For many rows (prefill, evaluation) it is decoded piece by piece into the processor's cache. Both compute in float32,
whatever the activations are; float64 is computed by torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from neoquant import native, packing
from neoquant.grids import Affine, Codebook, Grid, Int8Rows, double_quant_table
from neoquant.kernels.base import Kernel, State, require_ids
from neoquant.native import products
from neoquant.tensor import QuantizedTensor

PIECE = 1 << 20  # weights decoded at once for what the library does not multiply


class Cpu(Kernel):
    """State: `packed` (NF4 and FP4: two codes a byte, high half first; affine: low bits first, rows on bytes) or
    `codes` (int8), parameters, `order`."""

    name: ClassVar[str] = "cpu"

    def refuse(self, grid: Grid, shape: tuple[int, ...], device: torch.device, ordered: bool = False) -> str | None:
        if not isinstance(grid, Codebook | Int8Rows | Affine):
            return f"the native library knows nf4, fp4, int8 and affine, not {grid.name}"
        if device.type != "cpu":
            return f"the native library runs on the CPU, not on {device.type}"
        active = native.active()
        return active.reason if active.library is None else None

    def pack(self, q: QuantizedTensor) -> State:
        state = dict(q.params) if q.order is None else {**q.params, "order": q.order}
        if isinstance(q.grid, Codebook):
            return {"packed": packing.pack_nibbles(q.codes.reshape(-1), pad=q.grid.zero_code), **state}
        if isinstance(q.grid, Affine):
            return {"packed": packing.pack(q.codes, q.grid.bits), **state}
        return {"codes": q.codes.contiguous().view(torch.int8), **state}

    def unpack(self, state: State, grid: Grid, shape: tuple[int, ...], dtype: torch.dtype) -> QuantizedTensor:
        if isinstance(grid, Codebook):
            codes = packing.unpack_nibbles(state["packed"], shape[0] * shape[1]).view(shape)
        elif isinstance(grid, Affine):
            codes = packing.unpack(state["packed"], grid.bits, shape[1])
        else:
            codes = state["codes"].view(torch.uint8)
        params = {name: state[name] for name in grid.param_shapes(shape)}
        return QuantizedTensor(codes, grid, params, state.get("order"), dtype)

    def native(self, state: State, grid: Grid, shape: tuple[int, ...]) -> products.Weight:
        """The weight as the library sees it; it must not have an activation order."""
        return _weight(state, grid, shape)

    def linear(self, x: Tensor, state: State, grid: Grid, shape: tuple[int, ...], bias: Tensor | None) -> Tensor:
        if "order" in state:
            x = x.index_select(-1, state["order"])
        w = _weight(state, grid, shape)
        rows = x.reshape(-1, shape[1])
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _Product.apply(rows, w, bias, self._product)  # type: ignore[no-untyped-call]
        else:
            y = self._product(rows, w, bias)
        return y.view(*x.shape[:-1], shape[0])

    def embedding(self, ids: Tensor, state: State, grid: Grid, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        require_ids(ids, shape[0])
        rows = products.decode_rows(_weight(state, grid, shape), ids.reshape(-1))
        if "order" in state:
            rows = torch.empty_like(rows).index_copy_(1, state["order"].long(), rows)
        return rows.to(dtype).view(*ids.shape, shape[1])

    def _product(self, x: Tensor, w: products.Weight, bias: Tensor | None) -> Tensor:
        """x[M, I] times the weight's transpose, plus bias[O], in x's type."""
        if x.dtype != torch.float64:
            return products.multiply(x.float(), w, None if bias is None else bias.float()).to(x.dtype)
        y = torch.empty(x.shape[0], w.rows, dtype=x.dtype)
        for start, piece in _pieces(w, x.dtype):
            torch.mm(x, piece.T, out=y[:, start : start + len(piece)])
        return y if bias is None else y.add_(bias)


class _Product(torch.autograd.Function):
    """The product, with the gradient of x; the weight has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: products.Weight, bias: Tensor | None, product: Callable[..., Tensor]) -> Tensor:
        ctx.weight = w
        return product(x, w, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        total = torch.zeros(grad.shape[0], ctx.weight.columns, dtype=grad.dtype)
        for start, piece in _pieces(ctx.weight, grad.dtype):
            total.addmm_(grad[:, start : start + len(piece)], piece)
        return total, None, None, None


def _weight(state: State, grid: Grid, shape: tuple[int, ...]) -> products.Weight:
    if isinstance(grid, Affine):
        group = None if grid.width(shape[1]) == shape[1] else grid.group_size
        return products.affine(state["packed"], state["scale"], state.get("zero"), grid.bits, group, shape)
    if not isinstance(grid, Codebook):
        return products.int8_rows(state["codes"], state["scb"], shape)
    nested = (state["nested_absmax"], double_quant_table(_CPU), state["nested_offset"]) if grid.double_quant else None
    return products.codebook(
        state["packed"], grid.table(_CPU), state["absmax"], nested, grid.block_size, shape, *grid.levels()
    )


def _pieces(w: products.Weight, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """The weight's rows, dtype[n, I], piece by piece, each with the number of its first row; one buffer for all."""
    step = max(1, min(w.rows, PIECE // w.columns))
    buffer = torch.empty(step, w.columns)
    for start in range(0, w.rows, step):
        piece = buffer[: min(step, w.rows - start)]
        products.decode(w, start, piece)
        yield start, piece.to(dtype)


_CPU = torch.device("cpu")
