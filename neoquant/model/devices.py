"""Devices, by what a user may say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from neoquant.errors import RequestError

LEGAL = "legal are auto, cpu, cuda, cuda:N, N"


def resolve_device(device: object) -> torch.device:
    """A device from what a user may say. Raises RequestError for what is not one, or is not there."""
    if device is None or device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device, int) or (isinstance(device, str) and device.isdecimal()):
        device = f"cuda:{device}"
    try:
        found: torch.device = torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        raise RequestError(f"device is {device!r}; {LEGAL}") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise RequestError(f"device is {str(found)!r}, but this machine has {torch.cuda.device_count()} CUDA devices")
    if found.type not in ("cpu", "cuda"):
        raise RequestError(f"device is {str(found)!r}; {LEGAL}")
    return torch.device("cuda", found.index or 0) if found.type == "cuda" else found  # two names are one device


@contextmanager
def cpu_by_default() -> Iterator[None]:
    """Files are read into the CPU's memory, whatever `torch.set_default_device` says.

    Raises RequestError for "meta", where a model would have no weights.
    """
    default = torch.get_default_device()
    if default.type == "meta":
        raise RequestError(
            "torch's default device is 'meta', which holds no weights: read them outside of "
            "`with torch.device('meta')`, or call the model's class with its configuration"
        )
    with nullcontext() if default.type == "cpu" else torch.device("cpu"):
        yield


def device_name(device: torch.device) -> str:
    """For records: the card's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
