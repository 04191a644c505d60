"""The types that a model computes in."""

from __future__ import annotations

import torch

from neoquant.errors import RequestError
from neoquant.model.config import GPTNeoConfig

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


# torch's other names, which transformers takes in config.json
_ALIASES = {"half": "float16", "float": "float32"}


def check_dtype(dtype: torch.dtype | str | None) -> None:
    """Raise RequestError for a type that no model computes in."""
    if dtype is not None and str(dtype).removeprefix("torch.") not in ("auto", *DTYPES):
        raise RequestError(f"dtype is {str(dtype)!r}; legal are auto, {', '.join(DTYPES)}")


def default_dtype(device: torch.device) -> torch.dtype:
    """What is computed in where nobody says: float32 on a CPU, bfloat16 on a GPU that has it, else float16.

    GPT-Neo's scores are not scaled, and its activations may pass 65504, where float16 ends
    (github.com/huggingface/transformers/issues/11076).
    """
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def resolve_dtype(
    dtype: torch.dtype | str | None, config: GPTNeoConfig, device: torch.device, stored: torch.dtype | None = None
) -> torch.dtype:
    """A type from what a user may say: "auto" is config.json's, or else `stored`, the type of the weights in the file.

    Raises RequestError for one that a model cannot compute in.
    """
    if dtype is None:
        return default_dtype(device)
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        name = str(config.dtype or stored or "float32").removeprefix("torch.")
        dtype = f"auto, that is {name}"
        name = _ALIASES.get(name, name)
    if name not in DTYPES:
        raise RequestError(f"dtype is {str(dtype)!r}; legal are auto, {', '.join(DTYPES)}")
    return DTYPES[name]
