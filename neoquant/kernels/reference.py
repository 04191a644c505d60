"""The truth: decode the weight in plain torch, then multiply. Runs everywhere."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from neoquant import packing
from neoquant.grids import Grid
from neoquant.kernels.base import Kernel, State, look_up, require_ids
from neoquant.tensor import QuantizedTensor


class Reference(Kernel):
    """State: `codes` packed by rows, the grid's parameters by their names, `order` where there is one."""

    name: ClassVar[str] = "reference"

    def refuse(self, grid: Grid, shape: tuple[int, ...], device: torch.device, ordered: bool = False) -> str | None:
        return None

    def pack(self, q: QuantizedTensor) -> State:
        state = {"codes": packing.pack(q.codes, q.grid.bits), **q.params}
        return state if q.order is None else {**state, "order": q.order}

    def unpack(self, state: State, grid: Grid, shape: tuple[int, ...], dtype: torch.dtype) -> QuantizedTensor:
        codes = packing.unpack(state["codes"], grid.bits, shape[1])
        params = {name: state[name] for name in grid.param_shapes(shape)}
        return QuantizedTensor(codes, grid, params, state.get("order"), dtype)

    def linear(self, x: Tensor, state: State, grid: Grid, shape: tuple[int, ...], bias: Tensor | None) -> Tensor:
        if "order" in state:
            x = x.index_select(-1, state["order"])
        w = grid.decode(packing.unpack(state["codes"], grid.bits, shape[1]), state, x.dtype)
        return torch.nn.functional.linear(x, w, bias)

    def embedding(self, ids: Tensor, state: State, grid: Grid, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        require_ids(ids, shape[0])
        rows = grid.decoding.sources(ids.reshape(-1), shape[0])
        codes = packing.unpack(state["codes"][rows], grid.bits, shape[1])
        return look_up(ids, codes, state, grid, shape, dtype)
