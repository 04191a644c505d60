"""Which positions of a batch of prompts hold padding."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from neoquant.errors import RequestError


def inferred_mask(ids: Tensor, pad: int | None, ends: Sequence[int]) -> Tensor | None:
    """The mask of `ids[B, T]` that nobody gave, bool `[B, T]`, or None where every position counts.

    What equals `pad` is padding, unless `pad` also ends a text: transformers' rule. Then some rows that begin or end
    with it are warned about. A row of nothing else is kept.
    """
    if pad is None or pad in ends:
        _warn_of_padding(ids, [pad, *ends] if pad is not None else list(ends))
        return None
    mask = ids != pad
    mask |= ~mask.any(1, keepdim=True)
    return None if bool(mask.all()) else mask


def _warn_of_padding(ids: Tensor, fillers: list[int]) -> None:
    if len(ids) < 2 or not fillers or ids.shape[1] == 0:
        return
    edges = torch.isin(ids[:, [0, -1]], torch.tensor(fillers, device=ids.device))
    if bool((edges.any(0) & ~edges.all(0)).any()):
        warnings.warn(
            "rows begin or end with an end-of-text token, without an attention_mask: it counts as text here; if it is "
            "padding, pass attention_mask=...",
            stacklevel=4,
        )


def left_padded(ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Which positions hold tokens once all padding of `ids[B, T]` is moved to the left, bool `[B, T]`, and the order
    of columns, `[B, T]`, that does it.

    Raises RequestError for a mask of another shape, or a row without a token.
    """
    if attention_mask.shape != ids.shape:
        raise RequestError(f"attention_mask is {list(attention_mask.shape)}, but input_ids is {list(ids.shape)}")
    keep = attention_mask.bool()
    if not bool(keep.any(1).all()):
        raise RequestError("attention_mask leaves a row no token: every prompt needs at least one")
    order = keep.int().argsort(dim=1, stable=True)
    return keep.gather(1, order), order


def stands_before(attention_mask: Tensor | None) -> bool:
    """Whether no padding of `attention_mask[B, T]` stands behind a token of its row."""
    if attention_mask is None:
        return True
    keep = attention_mask.bool()
    return not bool((keep[..., :-1] & ~keep[..., 1:]).any())
