"""Keys and values of the positions already seen, in buffers that are written in place.

A global layer holds every position. A local layer looks back no further than its window, so it holds the window and a
few positions more: its buffer slides, and what stands before it is forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neoquant.errors import RequestError
from neoquant.model.config import GPTNeoConfig
from neoquant.model.stored_states import STORAGES, StoredStates, bytes_a_head
from neoquant.sizes import plural

TAKEN_BACK = 16
"""Positions before a local layer's window that are still held, so that as many new ones can be taken back."""
SLIDES = 64
"""Positions that a local layer's buffer has beyond its window: it slides when they are full, not for each new one."""


class KVCache:
    """The keys and the values of each layer, `[B, H, positions, D]`.

    Buffers start at `capacity` positions and double when they are full. The first positions are held as they come where
    they fill the capacity, so that a cache that nobody uses costs no copy. Layers report their new keys and values in
    order, and the length counts once the last layer has: all layers of one forward pass see the same length.

    `windows` has an entry a layer: how many positions a local one sees, None for a global one; without it all are
    global. `storage` is the type that keys and values are held in: "float32", "float16", "int8" (see `StoredStates`),
    or None for the type that they come in. Attention meets what is held, of the new positions as well. Keys and values
    that need gradients are held as they come.
    """

    def __init__(
        self, num_layers: int, capacity: int = 64, *, windows: Sequence[int | None] = (), storage: str | None = None
    ) -> None:
        require_storage(storage)
        self.num_layers = num_layers
        self.length = 0
        self.storage = storage
        self._layers = [_Layer(capacity, window, storage) for window in windows or [None] * num_layers]

    @classmethod
    def of(cls, config: GPTNeoConfig, capacity: int = 64, storage: str | None = None) -> KVCache:
        """For a model of that configuration."""
        return cls(config.num_layers, capacity, windows=windows_of(config), storage=storage)

    def get_seq_length(self) -> int:
        """Positions seen (transformers' name for `length`)."""
        return self.length

    @property
    def nbytes(self) -> int:
        """What the buffers take."""
        return sum(stored.nbytes for layer in self._layers for stored in layer.stored)

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append `key` and `value` `[B, H, T, D]`; returns those of the last positions, `[B, H, S, D]`.

        S is length + T for a global layer. For a local one it may be less, but holds all that the T positions see.
        """
        one = self._layers[layer]
        if one.takes_whole(key, value):
            found = one.join(key, value)
        else:
            keys, values, held = one.room(tuple(key.shape), key)
            keys.write(held, key)
            values.write(held, value)
            end = held + key.shape[2]
            found = keys.read(end, key.dtype), values.read(end, value.dtype)
        self.advance(layer, key.shape[2])
        return found

    def states(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the last positions that a layer holds, `[B, H, S, D]`, in the type of its buffers."""
        keys, values = self._layers[layer].held_states()
        return keys, values

    def room(self, layer: int, shape: tuple[int, ...], like: Tensor) -> tuple[StoredStates, StoredStates, int]:
        """A layer's buffers, in which the next positions, `shape` = (B, H, T, D), have room, and where those begin.

        Buffers are made on the device of `like` and for its type, and stay as they are; what is written there counts
        from `advance` on.
        """
        return self._layers[layer].room(shape, like)

    def advance(self, layer: int, positions: int) -> None:
        """So many positions were written to the layer's buffers."""
        self._layers[layer].advance(positions)
        if layer == self.num_layers - 1:
            self.length += positions

    def crop(self, length: int) -> None:
        """Take the positions from `length` on back: at most TAKEN_BACK where local layers have forgotten any."""
        for layer in self._layers:
            layer.crop(self.length - length)
        self.length = length

    def select(self, rows: Tensor) -> None:
        """Go on with these rows of the batch, int64[rows], in this order."""
        for layer in self._layers:
            layer.stored = tuple(stored.select(rows) for stored in layer.stored)


class _Layer:
    """What one layer holds: nothing yet, or keys and values, of which the first `held` positions count."""

    def __init__(self, capacity: int, window: int | None, storage: str | None) -> None:
        self.capacity, self.window, self.storage = capacity, window, storage
        self.stored: tuple[StoredStates, ...] = ()
        self.held = self.forgotten = 0

    def takes_whole(self, key: Tensor, value: Tensor) -> bool:
        """Whether new positions are held as the tensors that they are."""
        if key.requires_grad or value.requires_grad:
            return True
        return self.storage is None and not self.stored and key.shape[2] >= self.capacity

    def join(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All positions held and the new ones, in tensors of their own: gradients may need them as they were."""
        if self.stored:
            before = [stored.read(self.held, key.dtype) for stored in self.stored]
            key, value = (torch.cat(pair, dim=2) for pair in zip(before, (key, value), strict=True))
        self.stored = StoredStates(key), StoredStates(value)
        return key, value

    def held_states(self) -> list[Tensor]:
        return [stored.read(self.held, stored.data.dtype) for stored in self.stored]

    def room(self, shape: tuple[int, ...], like: Tensor) -> tuple[StoredStates, StoredStates, int]:
        if not self.stored or not self.stored[0].made or self.stored[0].capacity < self.held + shape[2]:
            self._move(shape, like, self._grown(self._kept() + shape[2]))
        keys, values = self.stored
        return keys, values, self.held

    def advance(self, positions: int) -> None:
        self.held += positions
        if self.window is not None and self.stored[0].made and self.stored[0].capacity > self.window + SLIDES:
            like = self.stored[0].data  # many positions came at once, and few of them are needed again
            self._move(tuple(like.shape), like, self.window + SLIDES)

    def crop(self, positions: int) -> None:
        least = self.window - 1 if self.window is not None and self.forgotten else 0
        if self.held - positions < least:
            raise RequestError(
                f"{plural(positions, 'position')} cannot be taken back from a cache: it holds too few before them"
            )
        self.held -= positions

    def _kept(self) -> int:
        """How many of the last positions are needed again."""
        return self.held if self.window is None else min(self.held, self.window - 1 + TAKEN_BACK)

    def _grown(self, needed: int) -> int:
        capacity = self.capacity
        while capacity < needed:
            capacity *= 2
        return capacity if self.window is None else max(needed, min(capacity, self.window + SLIDES))

    def _move(self, shape: tuple[int, ...], like: Tensor, capacity: int) -> None:
        """The positions that are needed again to the front of buffers of that capacity."""
        old, kept = self.stored, self._kept()
        begin, self.held = self.held - kept, kept
        self.forgotten += begin
        if not old or not old[0].made or old[0].capacity != capacity:
            self.stored = tuple(StoredStates.empty(shape, capacity, like, self.storage) for _ in range(2))
        for stored, before in zip(self.stored, old, strict=False):
            stored.copy(before, begin, kept)


def require_storage(storage: str | None) -> None:
    """Raise RequestError for a type that no cache is held in."""
    if storage is not None and storage not in STORAGES:
        raise RequestError(f"a cache is held in {', '.join(STORAGES)}, not {storage!r}")


def given_cache(past_key_values: KVCache | None, cache: KVCache | None) -> KVCache | None:
    """The one that was given under either of its names. Raises RequestError where both were."""
    if past_key_values is not None and cache is not None:
        raise RequestError("past_key_values and cache are two names of the same: give one of them")
    return cache if past_key_values is None else past_key_values


def windows_of(config: GPTNeoConfig) -> list[int | None]:
    """How many positions each layer sees; None: all."""
    return [config.window_size if kind == "local" else None for kind in config.attention_layers]


def cache_bytes(config: GPTNeoConfig, positions: int, batch: int = 1, storage: str = "float32") -> int:
    """What keys and values of so many positions take in a cache made for them."""
    held = sum(positions if window is None else min(positions, window + SLIDES) for window in windows_of(config))
    return 2 * batch * held * config.num_heads * bytes_a_head(config.hidden_size // config.num_heads, storage)
