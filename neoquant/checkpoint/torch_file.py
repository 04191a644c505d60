"""Where the tensors of a `pytorch_model.bin` lie, without running the code that a pickle may carry.

Since torch 1.6 such a file is an uncompressed zip: the pickle inside tells each tensor's type and shape, and its
bytes stand somewhere in the file as they are. So they can be read one at a time. Older files, and rare zips with
compressed or big-endian members, must be loaded whole.
"""

from __future__ import annotations

import pickle
import tarfile
import zipfile
from bisect import bisect_right
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from neoquant.checkpoint.headers import MAX_HEADER_BYTES, TensorHeader
from neoquant.checkpoint.stored import Span
from neoquant.errors import CheckpointError

# Where programs put a model's tensors in a file that holds more: beside an optimizer's state, an epoch, options.
_WRAPPING_KEYS = ("state_dict", "model_state_dict", "model", "module")


class TorchFile(NamedTuple):
    """The tensors of a `.bin` file in its own order; those that cannot be read singly come loaded.

    `key` is what they stand under where the file holds more than them.
    """

    tensors: list[tuple[TensorHeader, Span | torch.Tensor]]
    key: str | None


_MOST_SHRUNK = 20  # how many times smaller a compressed file of weights may be


def list_tensors(path: Path) -> TorchFile:
    """List a `.bin` file's tensors.

    Raises:
        CheckpointError: not a file of torch.save, damaged, or its pickle wants more than tensors.
    """
    members = _plain_members(path)
    if members is not None:
        tensors, key = _load(path, device="meta")
        if all(_place(tensor) is not None for tensor in tensors.values()):
            spans = [(_header(name, tensor), _span(name, tensor, members)) for name, tensor in tensors.items()]
            return TorchFile([*spans], key)
    tensors, key = _load(path, device="cpu")
    return TorchFile([(_header(name, tensor), tensor) for name, tensor in tensors.items()], key)


def _header(name: str, tensor: torch.Tensor) -> TensorHeader:
    return TensorHeader(name, tensor.dtype, tuple(tensor.shape))


def _place(tensor: torch.Tensor) -> int | None:
    """Where its storage begins in the file: torch notes that on storages it leaves out, since 2.7."""
    return getattr(tensor.untyped_storage(), "_checkpoint_offset", None)


def _span(name: str, tensor: torch.Tensor, members: list[zipfile.ZipInfo]) -> Span:
    """Locate a tensor, and hold what the pickle says of its storage against what the zip says."""
    place, size = _place(tensor) or 0, tensor.untyped_storage().nbytes()
    if size > 0:
        following = bisect_right(members, place, key=lambda member: member.header_offset)
        if following == 0 or members[following - 1].file_size != size or tensor.nbytes > size:
            raise CheckpointError(f"tensor {name!r} does not fit the bytes stored for it; the file is damaged")
    return Span(place + int(tensor.storage_offset()) * tensor.itemsize, tensor.stride())


def _require_bounded(members: list[zipfile.ZipInfo], file_size: int) -> None:
    """Refuse a zip that becomes much more than it is: weights hardly shrink, and a pickle holds names and shapes."""
    for member in members:
        if member.filename.endswith(".pkl") and member.file_size > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"its pickle has {member.file_size:,} bytes, and at most {MAX_HEADER_BYTES:,} are read"
            )
    if (whole := sum(member.file_size for member in members)) > max(_MOST_SHRUNK * file_size, 1 << 26):
        raise CheckpointError(f"{file_size:,} bytes would become {whole:,}, which weights do not: the file is damaged")


def _plain_members(path: Path) -> list[zipfile.ZipInfo] | None:
    """The members of a zip in file order; None where bytes are not stored as they are, in this machine's order."""
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            members = sorted(archive.infolist(), key=lambda member: member.header_offset)
            _require_bounded(members, path.stat().st_size)
            orders = [archive.read(member) for member in members if member.filename.endswith("/byteorder")]
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:  # damaged, unknown compression, encrypted
        raise CheckpointError(f"the file is damaged ({error})") from None
    plain = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    return members if plain and orders in ([], [b"little"]) else None


def _load(path: Path, device: str) -> tuple[Mapping[str, torch.Tensor], str | None]:
    """The tensors by name, and the key that they stand under, if they do."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise anything: unpickling is running a small program
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error):
            if beginning := _no_file_of_torch(path):
                raise CheckpointError(f"the file was not written by torch.save: it begins with {beginning}") from error
            raise CheckpointError(
                "the pickle holds more than tensors, and running it could do anything, so it is not loaded; "
                "convert the model to safetensors where you trust it"
            ) from error
        raise CheckpointError(f"the file is damaged or was not written by torch.save ({reason})") from error
    if _is_state(content):
        return content, None
    inside = _states_inside(content)
    if len(inside) == 1:
        return inside.popitem()[::-1]
    if inside:
        raise CheckpointError(
            f"the file holds tensors under {' and '.join(map(repr, inside))}: save the ones that are meant alone"
        )
    raise CheckpointError("the file holds something else than a mapping of names to dense tensors")


def _no_file_of_torch(path: Path) -> str | None:
    """The first bytes of a file that begins neither as a zip, nor as a pickle, nor as a tar; None for one of these.

    torch says of any other that it holds more than tensors: its first byte is an instruction that torch does not know.
    """
    with path.open("rb") as file:
        beginning = file.read(4)
    known = beginning.startswith((b"PK\x03\x04", b"\x80")) or tarfile.is_tarfile(path)
    return None if known else f"{beginning!r}"


def _states_inside(content: object) -> dict[str, Mapping[str, torch.Tensor]]:
    """The mappings of names to tensors that a file holds by key: those under well-known keys, or else all."""
    if not isinstance(content, Mapping):
        return {}
    inside = {key: value for key, value in content.items() if isinstance(key, str) and _is_state(value) and len(value)}
    known = {key: value for key, value in inside.items() if key in _WRAPPING_KEYS}
    return known or inside


def _is_state(content: object) -> bool:
    """Whether this is a mapping of names to tensors."""
    return isinstance(content, Mapping) and all(_is_entry(*entry) for entry in content.items())


def _is_entry(name: object, tensor: object) -> bool:
    return isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
