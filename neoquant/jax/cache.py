"""Keys and values of earlier positions, in arrays of a fixed size, so that one program serves every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class FlaxCache:
    """`keys` and `values` hold an array [B, H, S, D] for each layer, of which the first `length` positions are filled.

    A value: going on gives another, and leaves this one as it is.
    """

    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    length: Any = 0

    @property
    def capacity(self) -> int:
        return int(self.keys[0].shape[2])


jax.tree_util.register_dataclass(FlaxCache, ("keys", "values", "length"), ())
