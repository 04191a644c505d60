"""Few new positions through all blocks of a network, in one call of the native library.

Between two blocks, Python takes as long as the library for a small one. `fused_blocks` is what `Decoder.steps` becomes
on a CPU; it gives None for everything that it does not do, and the blocks are called one after the other.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn

from neoquant.model.cache import KVCache
from neoquant.model.gpt_neo import AttentionMasks, Block
from neoquant.native.step import CachedStates, NativeBlocks, outruns_torch
from neoquant.nn.fused_block import (
    FEW,
    PreparedBlock,
    anatomy,
    belongs,
    by_rows,
    described,
    has_room,
    is_ordinary,
)
from neoquant.nn.linear import is_hooked, is_traced

ROWS_AT_ONCE = 64
"""Rows that go through all blocks in one call."""
WORK_AT_ONCE = 2**29
"""Multiplications in a block up to which more rows do. For more, what lies between two calls is nothing beside them,
and an interruption is heard there."""


def fused_blocks(blocks: nn.ModuleList, x: Tensor, masks: AttentionMasks, cache: KVCache | None) -> Tensor | None:
    """x[B, T, C] through all blocks: [B, T, C], with their keys and values added to `cache`; or None, and nothing done.

    None is given where there is no cache, for many rows (ROWS_AT_ONCE, WORK_AT_ONCE), and where `fused_block` would
    give it for any of the blocks, or hooks listen to one.
    """
    if cache is None or is_traced():
        return None
    if not is_ordinary(x, masks.keep):
        _ROWS.pop(blocks, None)  # see prepared_block
        return None
    rows, positions, width = x.shape
    if not belongs(masks, rows, positions, cache.length):
        return None
    row = row_of(blocks)
    if row is None or not row.takes(rows * positions, width):
        return None
    return row.step(x, masks.keep, cache)


class Row:
    """Blocks one behind the other, which are taken through in one call."""

    def __init__(self, blocks: list[nn.Module], prepared: list[PreparedBlock]) -> None:
        self.blocks, self.prepared = blocks, prepared
        self.native = NativeBlocks([one.native for one in prepared])
        self._widths = {one.width for one in prepared}
        self._plain = any(one.plain for one in prepared)
        self._most_rows = max(ROWS_AT_ONCE, WORK_AT_ONCE // max(one.native.size for one in prepared))

    def holds(self, blocks: list[nn.Module]) -> bool:
        """Whether these are the blocks, and nothing about them has changed."""
        if len(blocks) != len(self.blocks):
            return False
        for block, known, prepared in zip(blocks, self.blocks, self.prepared, strict=True):
            if block is not known or not _steps_alone(block) or not prepared.holds(block):
                return False
        return True

    def takes(self, rows: int, width: int) -> bool:
        """Whether so many rows of that width may go through."""
        few = rows <= FEW or not self._plain or outruns_torch()
        return few and rows <= self._most_rows and self._widths == {width}

    def step(self, x: Tensor, keep: Tensor | None, cache: KVCache) -> Tensor | None:
        """See `fused_blocks`: `keep`, bool[B or 1, S], is False on padding; the rest has been looked at."""
        rows, positions, _ = x.shape
        cached = _CACHED.get(cache)
        if cached is None:
            cached = _CACHED[cache] = _Description(cache.num_layers)
        if not cached.describe(cache, self.prepared, x):
            return None
        y = self.native.step(x, cached.states, None if keep is None else by_rows(keep.expand(rows, -1)))
        for prepared in self.prepared:
            cache.advance(prepared.layer, positions)
        return y


def _steps_alone(block: nn.Module) -> bool:
    """Whether all that a call of the block does is its step."""
    return type(block) is Block and block.step is not None and not is_hooked(block)


def row_of(blocks: nn.ModuleList) -> Row | None:
    """The blocks as the library takes them, described anew where anything has changed; or None."""
    now = list(blocks._modules.values())
    row = _ROWS.get(blocks)
    if row is not None and row.holds(now):
        return row
    _ROWS.pop(blocks, None)
    prepared = []
    for block in now:
        one = described(block, anatomy) if block is not None and _steps_alone(block) else None
        if one is None:
            return None
        prepared.append(one)
    _ROWS[blocks] = row = Row(now, prepared)
    return row


class _Description:
    """A cache's description for the library: it stays as long as its buffers are the same."""

    def __init__(self, layers: int) -> None:
        self.states = CachedStates(layers)
        self._known: list[tuple[Any, ...]] = [()] * layers

    def describe(self, cache: KVCache, blocks: list[PreparedBlock], x: Tensor) -> bool:
        """Describe the room for the new positions x[B, T, C]; False where it is not as the library takes it."""
        if len(blocks) != cache.num_layers:
            return False
        end = cache.length
        rows, positions, _ = x.shape
        for number, prepared in enumerate(blocks):
            shape = prepared.states_of(rows, positions)
            keys, values, held = cache.room(prepared.layer, shape, x)
            known = self._known[number]
            if not (known and known[0]() is keys.data and known[1]() is values.data and known[2] == shape):
                if prepared.layer != number or not (has_room(keys, shape) and has_room(values, shape)):
                    return False
                self.states.hold(number, keys, values)
                self._known[number] = ref(keys.data), ref(values.data), shape
            self.states.count(number, held, end - held)
        return True


# Not in what they describe, which may be copied and pickled.
_ROWS: WeakKeyDictionary[nn.ModuleList, Row] = WeakKeyDictionary()
_CACHED: WeakKeyDictionary[KVCache, _Description] = WeakKeyDictionary()
