"""Where the tensors of a `pytorch_model.bin` lie, without running the code that a pickle may carry.

Since torch 1.6 such a file is an uncompressed zip: the pickle inside tells each tensor's type and shape, and its
bytes stand somewhere in the file as they are. So they can be read one at a time. Older files, and rare zips with
compressed or big-endian members, must be loaded whole.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from neoquant.checkpoint.headers import TensorHeader
from neoquant.errors import CheckpointError


class Span(NamedTuple):
    """Where a tensor lies in a file: its first byte, and the elements from one index to the next along each axis.

    A stride of () says that the tensor lies row by row, without gaps.
    """

    begin: int
    stride: tuple[int, ...]


def list_tensors(path: Path) -> list[tuple[TensorHeader, Span | torch.Tensor]]:
    """List a `.bin` file's tensors in its own order; those that cannot be read singly come loaded.

    Raises:
        CheckpointError: not a file of torch.save, damaged, or its pickle wants more than tensors.
    """
    if _is_plain_zip(path):
        tensors = _load(path, device="meta")
        spans = {name: _span(tensor) for name, tensor in tensors.items()}
        if all(span is not None for span in spans.values()):
            return [(_header(name, tensor), spans[name]) for name, tensor in tensors.items()]  # type: ignore[misc]
    return [(_header(name, tensor), tensor) for name, tensor in _load(path, device="cpu").items()]


def _header(name: str, tensor: torch.Tensor) -> TensorHeader:
    return TensorHeader(name, tensor.dtype, tuple(tensor.shape))


def _span(tensor: torch.Tensor) -> Span | None:
    """torch notes the place in the file on the storages it leaves out (`torch.load` to "meta", since 2.7)."""
    place: int | None = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    return None if place is None else Span(place + int(tensor.storage_offset()) * tensor.itemsize, tensor.stride())


def _is_plain_zip(path: Path) -> bool:
    """Whether every member is stored as it is, in this machine's byte order."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            orders = [archive.read(member) for member in members if member.filename.endswith("/byteorder")]
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"the file is damaged ({error})") from None
    return all(member.compress_type == zipfile.ZIP_STORED for member in members) and orders in ([], [b"little"])


def _load(path: Path, device: str) -> Mapping[str, torch.Tensor]:
    try:
        tensors = torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise anything: unpickling is running a small program
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise CheckpointError(
                "the pickle holds more than tensors, and running it could do anything, so it is not loaded; "
                "convert the model to safetensors where you trust it"
            ) from error
        raise CheckpointError(f"the file is damaged or was not written by torch.save ({reason})") from error
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise CheckpointError("the file holds something else than a mapping of names to tensors")
    return tensors
