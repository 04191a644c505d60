"""One new token after another as one CUDA graph: what a token launches is recorded once and replayed as a whole.

A token of a small model is some hundred launches, and each takes the host longer than it takes the GPU. A graph has one
for all. What it repeats must not depend on the host, which is `static_cache`'s part; where nothing but the logits
decides, the next token is chosen in the graph too. Looking for the end stays outside.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from neoquant.model.cache import KVCache
from neoquant.model.gpt_neo import CausalLM
from neoquant.model.static_cache import StaticCache, StaticMasks

WARM_UPS = 3  # before recording: libraries and compilers prepare themselves in the first calls
Choose = Callable[[Tensor], Tensor]
"""From the next token's logits `[B, V]` to the token `[B]`, negative where there is none to choose."""

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
        choose: chooses each token, within the graph; None: whoever asks for `logits` does.
        generator: what `choose` draws from.
    """

    def __init__(
        self,
        model: CausalLM,
        held: KVCache,
        keep: Tensor | None,
        positions: Tensor | None,
        types: Tensor | None,
        choose: Choose | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.model, self.keep, self.types = model, keep, types
        self.choose, self._generator = choose, generator
        self._next = None if positions is None else positions.clone()
        self.cache, self.masks = self._room(held)
        self._replay: Callable[[], None] | None = None
        self._ids, self._logits, self._chosen = Tensor(), Tensor(), Tensor()

    def logits(self, ids: Tensor) -> Tensor:
        """Behind ids[B, 1], `[B, V]`."""
        replay = self._recorded(ids)
        self._ids.copy_(ids)
        replay()
        return self._logits.clone()  # the next replay overwrites it

    def chosen(self, ids: Tensor) -> Tensor:
        """What `choose` gives, `[B]`, behind ids[B, 1] and, from the second call on, what it gave before. The next call
        overwrites it."""
        self._recorded(self._ids if self._ids.numel() else ids)()
        return self._chosen

    def _recorded(self, ids: Tensor) -> Callable[[], None]:
        """What replays the next token, recorded anew behind ids[B, 1] where there is no room for it."""
        if self.cache.length == self.cache.capacity:
            self.cache, self.masks = self._room(self.cache)
            self._replay = None
        if self._replay is None:
            self._ids, given = ids.clone(), ids.clone()
            with torch.cuda.device(self.model.device):  # what is recorded is the current one's work
                self._replay = record(self._step, partial(self._rewind, given), self._generator)
        self.cache.length += 1
        return self._replay

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
        if self.choose is not None:
            self._chosen = self.choose(self._logits)
            self._ids.copy_(self._chosen.clamp(min=0)[:, None])
        self._go(1)

    def _go(self, positions: int) -> None:
        self.cache.at.add_(positions)
        if self._next is not None:
            self._next.add_(positions)

    def _rewind(self, ids: Tensor) -> None:
        """As if the last step, behind ids[B, 1], had not been: it would write the same again."""
        self._ids.copy_(ids)
        self._go(-1)


def record(
    step: Callable[[], None], rewind: Callable[[], None], generator: torch.Generator | None = None
) -> Callable[[], None]:
    """What repeats all that `step` launches, and goes on to draw from `generator`. `rewind` undoes it: it is called for
    each of the calls that prepare."""
    drawn = None if generator is None else generator.get_state()
    beside: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(WARM_UPS):
            step()
            rewind()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    if generator is not None and drawn is not None:
        generator.set_state(drawn)
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        step()
    replay: Callable[[], None] = graph.replay
    return replay
