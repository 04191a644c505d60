"""Kernels as operators of torch, for `torch.compile` and `torch.export`: a compiler sees one step, not what it does.

Elsewhere layers call their kernel directly, which takes less time.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neoquant.grids import Grid, grid_from_dict
from neoquant.kernels import KERNELS, ROUNDING
from neoquant.kernels.base import Kernel


class _Held(NamedTuple):
    """What a layer's tensors are: the kernel that holds them, by which names, and the weight [O, I] on its grid."""

    kernel: Kernel
    names: list[str]
    grid: Grid
    shape: tuple[int, int]


def describe(kernel: Kernel, names: list[str], grid: Grid, shape: tuple[int, int]) -> str:
    """What the operators below are told of a layer's tensors, which are given in the order of `names`."""
    return json.dumps([kernel.name, names, grid.describe(), list(shape)])


@cache
def _read(what: str) -> _Held:
    kernel, names, grid, shape = json.loads(what)
    return _Held({**KERNELS, **ROUNDING}[kernel], names, grid_from_dict(grid), tuple(shape))


@torch.library.custom_op(
    "neoquant::linear", mutates_args=(), schema="(Tensor x, Tensor[] state, str what, Tensor? bias) -> Tensor"
)
def linear(x: Tensor, state: list[Tensor], what: str, bias: Tensor | None) -> Tensor:
    """`Kernel.linear`: x[..., I] to [..., O]; `what` is `describe`'s."""
    held = _read(what)
    return held.kernel.linear(x, dict(zip(held.names, state, strict=True)), held.grid, held.shape, bias)


@torch.library.custom_op(
    "neoquant::linear_backward", mutates_args=(), schema="(Tensor grad, Tensor[] state, str what) -> Tensor"
)
def linear_backward(grad: Tensor, state: list[Tensor], what: str) -> Tensor:
    """The gradient of x[..., I], of that of the product [..., O]."""
    held = _read(what)
    given = dict(zip(held.names, state, strict=True))
    return grad @ held.kernel.unpack(given, held.grid, held.shape, grad.dtype).dequantize(grad.dtype)


@torch.library.custom_op(
    "neoquant::embedding", mutates_args=(), schema="(Tensor ids, Tensor[] state, str what, ScalarType dtype) -> Tensor"
)
def embedding(ids: Tensor, state: list[Tensor], what: str, dtype: torch.dtype) -> Tensor:
    """`Kernel.embedding`: ids[...] to dtype[..., I]."""
    held = _read(what)
    return held.kernel.embedding(ids, dict(zip(held.names, state, strict=True)), held.grid, held.shape, dtype)


@linear.register_fake
def _(x: Tensor, state: list[Tensor], what: str, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], _read(what).shape[0])


@linear_backward.register_fake
def _(grad: Tensor, state: list[Tensor], what: str) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], _read(what).shape[1])


@embedding.register_fake
def _(ids: Tensor, state: list[Tensor], what: str, dtype: torch.dtype) -> Tensor:
    return ids.new_empty(*ids.shape, _read(what).shape[1], dtype=dtype)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, state, ctx.what, _ = inputs
    ctx.save_for_backward(*state)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    state = list(ctx.saved_tensors)
    return linear_backward(grad, state, ctx.what), [None] * len(state), None, None


linear.register_autograd(_backward, setup_context=_remember)
