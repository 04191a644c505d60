"""The native library's kernels, for every grid whose `Decoding` fits them, on CPUs.

Few rows of activations (generating) are multiplied with the packed weight as it lies: every byte of it is read once.
For many rows (prefill, evaluation) it is decoded piece by piece into the processor's cache. Both compute in float32,
whatever the activations are; float64 is computed by torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from neoquant import native
from neoquant.grids import Grid
from neoquant.kernels.base import Kernel, State, require_ids
from neoquant.kernels.native_weight import native_weight, pack_codes, refuse, unpack_codes
from neoquant.native import products
from neoquant.tensor import QuantizedTensor

PIECE = 1 << 20  # weights decoded at once for what the library does not multiply


class Cpu(Kernel):
    """State: the codes as `native_weight` packs them, parameters, `order` where there is one."""

    name: ClassVar[str] = "cpu"

    def refuse(self, grid: Grid, shape: tuple[int, ...], device: torch.device, ordered: bool = False) -> str | None:
        if device.type != "cpu":
            return f"the native library runs on the CPU, not on {device.type}"
        active = native.active()
        return active.reason if active.library is None else refuse(grid, shape)

    def pack(self, q: QuantizedTensor) -> State:
        state = {**pack_codes(q.codes, q.grid), **q.params}
        return state if q.order is None else {**state, "order": q.order}

    def unpack(self, state: State, grid: Grid, shape: tuple[int, ...], dtype: torch.dtype) -> QuantizedTensor:
        params = {name: state[name] for name in grid.param_shapes(shape)}
        return QuantizedTensor(unpack_codes(state, grid, shape), grid, params, state.get("order"), dtype)

    def native(self, state: State, grid: Grid, shape: tuple[int, ...]) -> products.Weight:
        """The weight as the library sees it; it must not have an activation order."""
        return native_weight(state, grid, shape)

    def linear(self, x: Tensor, state: State, grid: Grid, shape: tuple[int, ...], bias: Tensor | None) -> Tensor:
        if "order" in state:
            x = x.index_select(-1, state["order"])
        w = native_weight(state, grid, shape)
        rows = x.reshape(-1, shape[1])
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _Product.apply(rows, w, bias, self._product)  # type: ignore[no-untyped-call]
        else:
            y = self._product(rows, w, bias)
        return y.view(*x.shape[:-1], shape[0])

    def embedding(self, ids: Tensor, state: State, grid: Grid, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        require_ids(ids, shape[0])
        rows = products.decode_rows(native_weight(state, grid, shape), ids.reshape(-1))
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


def _pieces(w: products.Weight, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """The weight's rows, dtype[n, I], piece by piece, each with the number of its first row; one buffer for all."""
    step = max(1, min(w.rows, PIECE // w.columns))
    buffer = torch.empty(step, w.columns)
    for start in range(0, w.rows, step):
        piece = buffer[: min(step, w.rows - start)]
        products.decode(w, start, piece)
        yield start, piece.to(dtype)
