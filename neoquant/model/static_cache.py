"""Keys and values in buffers that never grow, written where a number on the device says: for work that is recorded once
and replayed, as a CUDA graph is.

A recording repeats the same operations on the same memory. So nothing here follows from a number of the host's: the
position is a tensor, every layer attends to its whole buffer, and a mask hides what is not there yet. A local layer's
buffer is a ring of its window: position p lies at place p modulo the window, over what is seen no longer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neoquant.model.cache import KVCache, windows_of
from neoquant.model.config import GPTNeoConfig
from neoquant.model.gpt_neo import AttentionMasks


class StaticCache:
    """What another cache held, with room for one position after another.

    `capacity` is that of global layers, in positions; `at` int64[1], on the device, is the position that comes next.
    """

    def __init__(self, config: GPTNeoConfig, held: KVCache | StaticCache, capacity: int, device: torch.device) -> None:
        self.length: int = held.length
        self.capacity, self.device = capacity, device
        self.at = torch.tensor([held.length], device=device)
        self._windows = windows_of(config)
        self._states = [
            tuple(_laid(states, held.length, window or capacity) for states in held.states(layer))
            for layer, window in enumerate(self._windows)
        ]
        self._places: dict[int | None, Tensor] = {}

    def begin(self) -> None:
        """The position that comes next is another one: before the first layer is asked."""
        self._places.clear()

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write `key` and `value` `[B, H, 1, D]` of the position that comes next; the layer's whole buffers."""
        keys, values = self._states[layer]
        window = self._windows[layer]
        if window not in self._places:  # in this token; layers of a kind share it
            self._places[window] = self.at % (window or self.capacity)
        place = self._places[window]
        keys.index_copy_(2, place, key)
        values.index_copy_(2, place, value)
        return keys, values

    def rings(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's buffers `[B, H, S, D]`, in which position p lies at place p modulo S: for whoever writes there."""
        keys, values = self._states[layer]
        return keys, values

    def states(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the last of `length` positions that a layer holds, `[B, H, S, D]`."""
        keys, values = self._states[layer]
        size, length = keys.shape[2], self.length
        order = torch.arange(max(0, length - size), length, device=self.device) % size
        return keys.index_select(2, order), values.index_select(2, order)


class StaticMasks(AttentionMasks):
    """What one new position sees of a `StaticCache`'s buffers; `keep[B, capacity]` is False on padding."""

    def __init__(self, cache: StaticCache, window: int, keep: Tensor | None) -> None:
        places = torch.arange(max(cache.capacity, window), device=cache.device)
        # attention asks `keep` whether anything is hidden: here always something is
        super().__init__(1, cache.capacity, window, places[None] >= 0 if keep is None else keep, cache.device)
        self._at, self._places, self.padding = cache.at, places, keep
        self._seen: dict[bool, Tensor] = {}

    def begin(self) -> None:
        """The position that comes next is another one: before the first layer asks."""
        self._seen.clear()

    def mask(self, local: bool, keys: int) -> Tensor:
        if local not in self._seen:
            self._seen[local] = (self._of_ring() if local else self._of_all())[:, None, None]
        return self._seen[local]

    def _of_all(self) -> Tensor:
        """Of a global layer's buffer, [B or 1, capacity]."""
        mask = (self._places[: self.S] <= self._at)[None]
        return mask if self.padding is None else mask & self.padding

    def _of_ring(self) -> Tensor:
        """Of a local layer's, [B or 1, window]."""
        position = self._at - (self._at - self._places[: self.window]) % self.window  # that lies at each place
        mask = (position >= 0)[None]
        return mask if self.padding is None else mask & self.padding.index_select(1, position.clamp(min=0))

    def is_plain_causal(self, local: bool) -> bool:
        return False


def _laid(states: Tensor, length: int, size: int) -> Tensor:
    """The last positions of states[B, H, S, D], S of `length`, in a buffer of `size`: p at place p modulo `size`."""
    buffer = states.new_zeros(*states.shape[:2], size, states.shape[3])
    count = min(states.shape[2], size)
    places = torch.arange(length - count, length, device=states.device) % size
    return buffer.index_copy_(2, places, states[:, :, states.shape[2] - count :])
