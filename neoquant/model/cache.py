"""Keys and values of the positions already seen, in buffers that are allocated once and written in place."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """One key and one value buffer `[B, H, capacity, D]` a layer.

    Buffers start at `capacity` positions and double when they are full. The first positions are held as they come where
    they fill the capacity, so that a cache that nobody uses costs no copy. Layers report their new keys and values in
    order, and the length counts once the last layer has: all layers of one forward pass see the same length.
    """

    def __init__(self, num_layers: int, capacity: int = 64) -> None:
        self.num_layers = num_layers
        self.capacity = capacity
        self.length = 0
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers

    def get_seq_length(self) -> int:
        """Positions held (transformers' name for `length`)."""
        return self.length

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append `key` and `value` `[B, H, T, D]`; returns views of all positions so far, `[B, H, length + T, D]`."""
        length, new = self.length, key.shape[2]
        fills = self._keys[layer] is None and new >= self.capacity
        if fills or key.requires_grad or value.requires_grad:
            key = self._keys[layer] = _join(self._keys[layer], length, key)
            value = self._values[layer] = _join(self._values[layer], length, value)
            self.advance(layer, new)
            return key, value
        end = length + new
        keys, values = self.room(layer, tuple(key.shape), key)
        keys[:, :, length:end] = key
        values[:, :, length:end] = value
        self.advance(layer, new)
        return keys[:, :, :end], values[:, :, :end]

    def room(self, layer: int, shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's buffers `[B, H, capacity, D]`, in which the next positions, `shape` = (B, H, T, D), have room.

        They are made in the type and on the device of `like`, and stay as they are; what is written there counts from
        `advance` on.
        """
        keys = self._keys[layer] = self._grown(self._keys[layer], shape, like)
        values = self._values[layer] = self._grown(self._values[layer], shape, like)
        return keys, values

    def advance(self, layer: int, positions: int) -> None:
        """So many positions were written to the layer's buffers."""
        if layer == self.num_layers - 1:
            self.length += positions

    def _grown(self, buffer: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
        B, H, T, D = shape
        end = self.length + T
        if buffer is not None and buffer.shape[2] >= end:
            return buffer
        capacity = self.capacity
        while capacity < end:
            capacity *= 2
        grown = torch.empty(B, H, capacity, D, dtype=like.dtype, device=like.device)
        if buffer is not None:
            grown[:, :, : self.length] = buffer[:, :, : self.length]
        return grown


def _join(held: Tensor | None, length: int, new: Tensor) -> Tensor:
    """`new[B, H, T, D]` behind the first `length` positions held, in a tensor of its own: gradients may need both."""
    return new if held is None else torch.cat([held[:, :, :length], new], dim=2)
