"""What JAX would get wrong in silence."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neoquant.errors import RequestError


def require_within(name: str, ids: Any, limit: int) -> None:
    """Raise RequestError for ids that a table of `limit` rows does not have: JAX would take the nearest in silence."""
    if isinstance(ids, jax.core.Tracer) or not np.size(ids):
        return
    lowest, highest = int(jnp.min(ids)), int(jnp.max(ids))
    if lowest < 0 or highest >= limit:
        raise RequestError(f"{name} are 0 to {limit - 1}, got {lowest} to {highest}")
