"""Where the tensors of a safetensors file lie."""

from __future__ import annotations

from pathlib import Path

from neoquant.checkpoint.headers import MAX_HEADER_BYTES, TensorHeader, parse_header
from neoquant.errors import CheckpointError
from neoquant.sizes import plural


def list_tensors(path: Path) -> list[tuple[TensorHeader, int]]:
    """A file's tensors, in its order, and the positions of their first bytes.

    Raises:
        CheckpointError: damaged, or not a safetensors file.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or 8 + length > size:
            raise CheckpointError(
                f"truncated, or not a safetensors file: {plural(size, 'byte')}, but the header "
                f"alone should end at {8 + length}"
            )
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(f"the header claims {length} bytes, at most {MAX_HEADER_BYTES} are legal")
        text = file.read(length)
    return [(header, 8 + length + begin) for header, begin in parse_header(text, size - 8 - length)]
