"""The types that a model computes in."""

from __future__ import annotations

import torch

from neoquant.errors import RequestError
from neoquant.model.config import GPTNeoConfig

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_dtype(dtype: torch.dtype | str | None, config: GPTNeoConfig, device: torch.device) -> torch.dtype:
    """A type from what a user may say. Raises RequestError for one that a model cannot compute in."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.float16
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        name = (config.dtype or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise RequestError(f"dtype is {str(dtype)!r}; legal are auto, {', '.join(DTYPES)}")
    return DTYPES[name]
