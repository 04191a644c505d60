"""Attention by others' kernels: torch's flex_attention and the package flash-attn, window and padding honoured.

Both take `query[B, H, T, D]` of the last T of S positions, `key` and `value[B, H, S, D]`, and `keep[B, S]`, False on
padding (None: there is none); `window` None is global attention. Scores are not scaled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neoquant.errors import RequestError

ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention", "flash_attention_2")


def require_implementation(name: str) -> None:
    """Raise RequestError for a name that there is not."""
    if name not in ATTENTION_IMPLEMENTATIONS:
        raise RequestError(f"attn_implementation is {name!r}; legal are {', '.join(ATTENTION_IMPLEMENTATIONS)}")


def require_possible(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Raise RequestError for an implementation that cannot run in this type on this device."""
    if reason := why_not(name, dtype, device):
        raise RequestError(f"attn_implementation {name!r} is not possible here: {reason}")


def why_not(name: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why an implementation cannot run in this type on this device, or None."""
    if name != "flash_attention_2":
        return None
    if find_spec("flash_attn") is None:
        return "it needs the package flash-attn, which is not installed (pip install flash-attn, with a CUDA device)"
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


def flex(query: Tensor, key: Tensor, value: Tensor, window: int | None, keep: Tensor | None) -> Tensor:
    """torch's flex_attention: compiled on a GPU; on a CPU as torch evaluates it, score by score. A row that sees
    nothing (padding on the left) gives 0."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T, S = query.shape[2], key.shape[2]
    past = S - T

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        behind = i + past - j
        seen = behind >= 0
        if window is not None:
            seen = seen & (behind < window)
        return seen if keep is None else seen & keep[b, j]

    mask = create_block_mask(sees, None if keep is None else len(keep), None, T, S, device=str(query.device))
    if query.device.type == "cuda":
        return _compiled(flex_attention)(query, key, value, block_mask=mask, scale=1.0)  # type: ignore[no-any-return]
    if torch.is_grad_enabled() and query.requires_grad:
        raise RequestError("flex_attention has no gradients on a CPU: take sdpa, or compute under torch.no_grad()")
    # Evaluated in pieces, the scores would be rounded to half precision, and overflow.
    y = flex_attention(query.float(), key.float(), value.float(), block_mask=mask, scale=1.0)
    return y.to(query.dtype)


def flash(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, keep: Tensor | None, dropout: float = 0.0
) -> Tensor:
    """flash-attn's kernel; rows of different lengths lie behind each other without padding."""
    import flash_attn

    behind = -1 if window is None else window - 1  # it counts positions before the query's own; -1 is all
    options: dict[str, Any] = {
        "dropout_p": dropout, "softmax_scale": 1.0, "causal": True, "window_size": (behind, 0 if window else -1)
    }  # fmt: skip
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))  # [B, T, H, D]
    if keep is None:
        y: Tensor = flash_attn.flash_attn_func(query, key, value, **options)
        return y.transpose(1, 2)
    begins = keep & ~F.pad(keep, (1, 0))[:, :-1]
    if bool((begins.sum(1) > 1).any()):
        raise RequestError(
            "attention_mask has gaps between tokens, which flash_attention_2 cannot leave out: take sdpa"
        )
    new = keep[:, -query.shape[1] :]
    out = torch.zeros_like(query)
    out[new] = flash_attn.flash_attn_varlen_func(
        query[new], key[keep], value[keep], *_ends(new, keep), int(new.sum(1).max()), int(keep.sum(1).max()), **options
    )
    return out.transpose(1, 2)


def _ends(*masks: Tensor) -> list[Tensor]:
    """Where each row of a mask begins and the last one ends, once only what it keeps lies in one line."""
    return [F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32) for mask in masks]


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)
