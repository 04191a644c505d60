"""Weights that have broken quantizers: what property tests draw from."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from neoquant.grids import BLOCK_SIZES, GROUP_SIZES, Affine, Codebook

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = ("normal", "constant", "zero", "outlier", "tiny", "grid", "one block zero", "sparse")

codebooks = st.builds(Codebook, st.sampled_from(["nf4", "fp4"]), st.sampled_from(BLOCK_SIZES), st.booleans())
affine_grids = st.builds(
    lambda bits, group, zeros: Affine(bits, group, **zeros),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from(GROUP_SIZES),
    st.sampled_from([{}, {"symmetric": True}, {"float_zero": True}]),
)


def make_weight(shape: tuple[int, int], dtype: torch.dtype, kind: str, seed: int = 0) -> Tensor:
    """A weight [O, I] of a kind, the same for the same seed."""
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=random)
    if kind == "constant":
        w = torch.full(shape, -0.37)
    elif kind == "zero":
        w = torch.zeros(shape)
    elif kind == "outlier":
        w.view(-1)[seed % w.numel()] = 6e4
    elif kind == "tiny":  # subnormal in its type
        w = w * 2 * torch.finfo(dtype).smallest_normal / 8
    elif kind == "grid":  # ties: values on and between the grid's
        w = torch.randint(-24, 25, shape, generator=random) / 24
    elif kind == "one block zero":
        w.view(-1)[32:96] = 0
    elif kind == "sparse":
        w = w * (torch.rand(shape, generator=random) < 0.02)
    return w.to(dtype)


def weights(max_rows: int = 40, max_columns: int = 150) -> st.SearchStrategy[Tensor]:
    """Weights of every kind and type, ragged and tiny shapes among them."""
    shapes = st.one_of(
        st.tuples(st.integers(1, max_rows), st.integers(1, max_columns)),
        st.sampled_from([(1, 1), (1, 2), (3, 1), (1, 4097), (64, 64), (2, 2048), (33, 127)]),
    )
    return st.builds(make_weight, shapes, st.sampled_from(DTYPES), st.sampled_from(KINDS), st.integers(0, 999))
