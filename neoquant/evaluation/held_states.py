"""A model whose keys and values are held as they are while it generates, to measure what that loses."""

from __future__ import annotations

from typing import Any

import torch

from neoquant.evaluation.scoring import Model, ModelAround
from neoquant.model.cache import KVCache, require_storage


class HeldStates(ModelAround):
    """A `Model` that meets the keys and values of all positions in float32, float16 or int8 (see `KVCache`)."""

    def __init__(self, model: Model, storage: str) -> None:
        """Raises RequestError for another type."""
        require_storage(storage)
        super().__init__(model)
        self._storage = storage

    def transformer(self, ids: torch.Tensor, **options: Any) -> Any:
        cache = KVCache.of(self.config, max(1, ids.shape[1]), self._storage)
        return self._model.transformer(ids, past_key_values=cache, **options)
