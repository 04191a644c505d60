"""One new token after another as one CUDA graph: what a token launches is recorded once and replayed as a whole.

A token of a small model is some hundred launches, and each takes the host longer than it takes the GPU. A graph has one
for all. What it repeats must not depend on the host, which is `static_cache`'s part; sampling and looking for the end
stay outside.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from neoquant.model.cache import KVCache
from neoquant.model.gpt_neo import CausalLM
from neoquant.model.static_cache import StaticCache, StaticMasks

WARM_UPS = 3  # before recording: libraries and compilers prepare themselves in the first calls
LEAST_CAPACITY = 256  # positions that global layers attend to, hidden ones included; it doubles when they are full


def refuse(model: CausalLM, cache_dtype: str | None) -> str | None:
    """Why a model's steps are not recorded, or None."""
    if model.device.type != "cuda":
        return f"the model lies on {model.device}"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "the model is spread over devices"
    if model.attn_implementation not in ("sdpa", "eager"):
        return f"{model.attn_implementation} attends to keys and values that it is told the number of"
    if cache_dtype is not None:
        return f"keys and values are held in {cache_dtype}"
    return "it is being trained" if model.training else None


class GraphedSteps:
    """Tokens behind those that `held` holds, one of each row at a time.

    Args:
        model: one that `refuse` does not refuse.
        held: the prompt's keys and values; they are copied.
        keep: bool[B, S], False on padding, or None: of all positions that will be asked for.
        positions: int64[B, 1] of the next token, from which the others count on; None: as many as are held.
        types: int64[B, 1] of new tokens, or None.
    """

    def __init__(
        self, model: CausalLM, held: KVCache, keep: Tensor | None, positions: Tensor | None, types: Tensor | None
    ) -> None:
        self.model, self.keep, self.types = model, keep, types
        self._next = None if positions is None else positions.clone()
        self.cache, self.masks = self._room(held)
        self._replay: Callable[[], None] | None = None
        self._ids, self._logits = Tensor(), Tensor()

    def logits(self, ids: Tensor) -> Tensor:
        """Behind ids[B, 1], `[B, V]`."""
        if self.cache.length == self.cache.capacity:
            self.cache, self.masks = self._room(self.cache)
            self._replay = None
        if self._replay is None:
            self._ids = ids.clone()
            self._replay = record(self._step, self._rewind)
        self._ids.copy_(ids)
        self._replay()
        self.cache.length += 1
        return self._logits.clone()  # the next replay overwrites it

    def _room(self, held: KVCache | StaticCache) -> tuple[StaticCache, StaticMasks]:
        """Place for what is held and for more."""
        config, device = self.model.config, self.model.device
        capacity = LEAST_CAPACITY
        while capacity <= held.length:
            capacity *= 2
        keep = self.keep
        if keep is not None:
            keep = torch.nn.functional.pad(keep, (0, max(0, capacity - keep.shape[1])), value=True)[:, :capacity]
        cache = StaticCache(config, held, capacity, device)
        return cache, StaticMasks(cache, config.window_size, keep)

    def _step(self) -> None:
        """All that a token launches. The positions go on by one."""
        decoder, at = self.model.transformer, self.cache.at
        x = decoder.wte(self._ids) + decoder.wpe(at[None] if self._next is None else self._next)
        if self.types is not None:
            x = x + decoder.wte(self.types)
        self.cache.begin()
        self.masks.begin()
        for block in decoder.h:
            x = block(x, self.masks, self.cache)
        self._logits = self.model.lm_head(decoder.ln_f(x))[:, -1]
        self._go(1)

    def _go(self, positions: int) -> None:
        self.cache.at.add_(positions)
        if self._next is not None:
            self._next.add_(positions)

    def _rewind(self) -> None:
        """As if the last step had not been: it would write the same again."""
        self._go(-1)


def record(step: Callable[[], None], rewind: Callable[[], None]) -> Callable[[], None]:
    """What repeats all that `step` launches. `rewind` undoes it: it is called for each of the calls that prepare."""
    beside: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(WARM_UPS):
            step()
            rewind()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    replay: Callable[[], None] = graph.replay
    return replay
