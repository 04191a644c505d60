"""The hash of a source checkpoint, by which its quantized copies say what they were made from."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import xxhash

from neoquant.checkpoint import TensorHeader
from neoquant.formats.base import dtype_name


def hash_tensor(header: TensorHeader, weight: torch.Tensor) -> bytes:
    """A tensor's line in the hash of the source: `name dtype [shape] XXH3-128 of its bytes`."""
    digest = xxhash.xxh3_128_hexdigest(weight.reshape(-1).view(torch.uint8).numpy().data)
    return f"{header.name} {dtype_name(header.dtype)} {list(header.shape)} {digest}\n".encode()


def join_hashes(lines: Iterable[bytes]) -> str:
    """The hash of the source: XXH3-128 of every tensor's line, in the order of the file.

    It tells sources apart, at the speed of memory; SHA-256 took longer than all else together. It is no seal: whoever
    wants to can make weights of any hash, and could as well write any hash into the record.
    """
    return f"xxh3_128:{xxhash.xxh3_128_hexdigest(b''.join(lines))}"
