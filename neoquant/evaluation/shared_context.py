"""Continuations of one context: its keys and values are computed once for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from neoquant.evaluation.corpus import Window
from neoquant.evaluation.scoring import ModelAround
from neoquant.model.cache import KVCache


class SharedContext(ModelAround):
    """A `Model` that reads what all rows of a batch begin with in one row, and the rest of each after it.

    What it gives is what the model gives: a causal model's states at the beginning do not depend on what follows.
    """

    def transformer(self, ids: torch.Tensor, **options: Any) -> Any:
        """`last_hidden_state[B, T, C]` of ids[B, T]."""
        rows, width = ids.shape
        same = int((ids == ids[:1]).all(0).int().cumprod(0).sum())
        if rows == 1 or same == 0:
            return self._model.transformer(ids, **options)
        cache = KVCache.of(self.config, width)
        first = self._model.transformer(ids[:1, :same], past_key_values=cache, **options).last_hidden_state
        states = [first.expand(rows, -1, -1)]
        if same < width:
            cache.select(torch.zeros(rows, dtype=torch.int64, device=ids.device))
            states.append(self._model.transformer(ids[:, same:], past_key_values=cache, **options).last_hidden_state)
        return SimpleNamespace(last_hidden_state=torch.cat(states, 1))


WORTHWHILE = 256
"""Positions that are saved where a context is read by itself: a small model reads fewer in less time than small batches
of their own take."""


def by_context(windows: Sequence[Window], tokens: int) -> Iterator[list[int]]:
    """Numbers of windows with one context, of which there are several, in batches of at most `tokens` positions.

    A context is what stands before what is scored; windows that have theirs alone, or a short one, are in none.
    """
    groups: dict[bytes, list[int]] = {}
    for number, window in enumerate(windows):
        groups.setdefault(window.ids[: -window.scored].numpy().tobytes(), []).append(number)
    for group in groups.values():
        shared = len(windows[group[0]].ids) - windows[group[0]].scored
        width = max(len(windows[number].ids) for number in group)
        if (len(group) - 1) * shared < WORTHWHILE:
            continue
        most = max(2, tokens // width)
        batches = [group[start : start + most] for start in range(0, len(group), most)]
        yield from (batch for batch in batches if len(batch) > 1)
