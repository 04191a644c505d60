"""What a tensor is called, and how the safetensors format says where it lies.

A safetensors file is eight bytes (the length of the header, little-endian), the header (JSON, padded with spaces),
and the tensors' bytes without holes: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from neoquant.errors import CheckpointError
from neoquant.sizes import plural

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
if hasattr(torch, "float8_e8m0fnu"):  # since torch 2.7
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The format's own limit: a longer header is damage, or an attempt to fill the memory.
MAX_HEADER_BYTES = 100_000_000


class TensorHeader(NamedTuple):
    """All that is known of a stored tensor before it is read."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def float_type(headers: Iterable[TensorHeader]) -> torch.dtype | None:
    """The type of a checkpoint's weights, as transformers takes it: the first floating-point tensor's, by name."""
    floats = {header.name: header.dtype for header in headers if header.dtype.is_floating_point}
    return floats[min(floats)] if floats else None


def require_storable(header: TensorHeader) -> None:
    """Raise CheckpointError for a tensor whose type the format does not have."""
    if header.dtype not in DTYPE_NAMES:
        raise CheckpointError(
            f"tensor {header.name!r} is {header.dtype}, which safetensors cannot hold: take it out of the checkpoint"
        )


def parse_header(text: bytes, data_bytes: int | None) -> list[tuple[TensorHeader, int]]:
    """Read the JSON of a safetensors header.

    Args:
        text: the header, without the eight bytes of its length.
        data_bytes: how many bytes follow it in the file; None where that is not known.

    Returns: each tensor and the position of its first byte after the header, in file order.

    Raises:
        CheckpointError: anything the format does not allow. Holes and overlaps between tensors are among it: they
            mean that the header and the data do not belong together.
    """
    try:
        entries = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"the header is not JSON ({error}); the file is damaged") from None
    if not isinstance(entries, dict):
        raise CheckpointError("the header is not a JSON object; the file is damaged")
    entries.pop("__metadata__", None)

    spans = sorted((_parse_entry(name, entry) for name, entry in entries.items()), key=lambda span: span[1:])
    position = 0
    for header, begin, end in spans:
        if begin != position:
            problem = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            raise CheckpointError(f"tensor {header.name!r} begins at byte {begin}, expected {position}: it {problem}")
        position = end
    if data_bytes is not None and position != data_bytes:
        found = "is truncated" if data_bytes < position else "has bytes left over"
        raise CheckpointError(
            f"the file {found}: the header describes {plural(position, 'byte')} of tensors, {data_bytes:,} exist"
        )
    return [(header, begin) for header, begin, _ in spans]


def render_header(tensors: Iterable[TensorHeader]) -> bytes:
    """The JSON of a safetensors header for tensors that follow one another without holes, not yet padded.

    Raises CheckpointError for a type that the format does not have.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        require_storable(tensor)
        end = position + tensor.nbytes
        entries[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    return json.dumps(entries, separators=(",", ":")).encode()


def _parse_entry(name: str, entry: Any) -> tuple[TensorHeader, int, int]:
    """Check one tensor's line in the header; return it with its first byte and the byte after its last."""
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        legal = isinstance(dtype_name, str) and all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        legal = False
    if not legal:
        raise CheckpointError(f"tensor {name!r} is described by {entry!r:.200}, expected dtype, shape and data_offsets")
    if dtype_name not in DTYPES:
        raise CheckpointError(f"tensor {name!r} has the dtype {dtype_name!r}; known are {', '.join(DTYPES)}")
    header = TensorHeader(name, DTYPES[dtype_name], tuple(shape))
    if end - begin != header.nbytes:
        raise CheckpointError(
            f"tensor {name!r} spans {end - begin} bytes, but {dtype_name} of shape {shape} takes {header.nbytes}"
        )
    return header, begin, end


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r:.100} appears twice")
        found[key] = value
    return found
