"""A few new positions to the logits of what follows them, past the modules of a network.

The weights that a token needs drive Python's and torch's own data out of the processor's cache, so that calling some
dozen modules, and looking at what each rests on, takes longer than it seems: a quarter of a token of 125M.
`DirectPass` is what `CausalLM.direct_pass` becomes on a CPU. It gives None for everything that it does not do, and the
network is called.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from neoquant.model.cache import KVCache
from neoquant.model.gpt_neo import CausalLM, Decoder
from neoquant.native import TorchAlone, products
from neoquant.nn.fused_block import Watched, is_ordinary, is_padding_mask, is_plain_norm, is_taken, packed
from neoquant.nn.fused_blocks import ROWS_AT_ONCE, Row, fused_blocks, row_of
from neoquant.nn.linear import QuantEmbedding, QuantLinear, StoredEmbedding, StoredLinear, is_hooked


class DirectPass:
    """The passes of one text, or of several together, behind each other.

    With `steady`, nobody changes the network while they last: what they rest on is looked at once.
    """

    def __init__(self, model: CausalLM, steady: bool) -> None:
        self._model, self._steady = model, steady
        self._ends: _Ends | None = None
        self._row: Row | None = None
        self._looked = self._ordinary = False

    def logits(
        self, ids: Tensor, cache: KVCache, last: int, positions: Tensor | None, keep: Tensor | None
    ) -> Tensor | None:
        """Behind the last of ids[B, T], `[B, last, V]`; or None, and nothing done, also where they are many.

        They are at `positions` int64[B, T], or behind those that are held. `keep` bool[B, S] is False on padding, S
        counting the new positions too. Their keys and values are added to `cache`.
        """
        if not 0 < ids.numel() <= ROWS_AT_ONCE:
            return None
        if not is_padding_mask(keep, len(ids), cache.length + ids.shape[1]):
            return None
        if not (self._looked and self._steady):
            self._look()
        ends, row = self._ends, self._row
        if ends is None or row is None or not row.takes(ids.numel(), ends.width):
            return None
        with _alone(ids.numel()):
            x = ends.embedded(ids, cache.length if positions is None else positions)
        if x is None or not (self._ordinary or is_ordinary(x, keep)):
            return None
        self._ordinary = self._steady
        y = row.step(x, keep, cache)
        return None if y is None else ends.logits(y, last)

    def _look(self) -> None:
        """Describe the network, anew where anything has changed."""
        self._looked = True
        usual = _is_usual(self._model)
        if not usual or self._ends is None or not self._ends.holds():
            self._ends = _Ends(self._model) if usual else None
        self._row = None if self._ends is None else row_of(self._model.transformer.h)


def _is_usual(model: CausalLM) -> bool:
    """Whether nothing but the network's own modules makes logits of token ids, and they are as they are taken here."""
    decoder = model.transformer
    if type(model).forward is not CausalLM.forward or type(decoder).forward is not Decoder.forward:
        return False
    if decoder.steps is not fused_blocks or decoder.training or is_hooked(model):
        return False
    if any(module._compiled_call_impl is not None for module in (model, decoder)):  # by `module.compile()`
        return False
    table = [decoder.wte.table] if isinstance(decoder.wte, QuantEmbedding) else []
    called = [decoder, decoder.wte, decoder.wpe, decoder.ln_f, model.lm_head, *table]
    if any(map(is_hooked, called)) or _has_any_global_hook():  # type: ignore[no-untyped-call]
        return False
    plain = type(decoder.wpe) in (nn.Embedding, StoredEmbedding)
    return plain and is_plain_norm(decoder.ln_f, decoder.config.hidden_size)


class _Ends:
    """What stands before the blocks and behind them, as it was when it was described."""

    def __init__(self, model: CausalLM) -> None:
        decoder = model.transformer
        head: nn.Module = model.lm_head
        self._wte, self._wpe, self._norm, self._head = decoder.wte, decoder.wpe, decoder.ln_f, head
        self.width = decoder.config.hidden_size
        table = decoder.wte.table if isinstance(decoder.wte, QuantEmbedding) else None
        modules = [decoder, decoder.wte, decoder.wpe, decoder.ln_f, head, *([] if table is None else [table])]
        self._watched = Watched((model, *modules), modules)
        looked_up = table is not None and is_taken(table) and decoder.wte.get_buffer("like").dtype == torch.float32
        self._table = packed(table).weight if table is not None and looked_up else None
        stored = isinstance(head, StoredLinear) and head.weight.dtype != torch.float32  # else torch multiplies
        self._product = packed(head) if (stored or isinstance(head, QuantLinear)) and is_taken(head) else None

    def holds(self) -> bool:
        """Whether nothing has changed."""
        return self._watched.holds()

    def embedded(self, ids: Tensor, positions: Tensor | int) -> Tensor | None:
        """ids[B, T] at positions int64[B, T], or from one on for all: [B, T, C]; None where one is out of range."""
        if ids.dtype != torch.int64:
            return None
        weight, T = self._wpe.weight, ids.shape[1]
        if isinstance(positions, int):
            if positions + T > len(weight):
                return None
            places = weight[positions : positions + T]
        elif _within(positions, len(weight)):
            places = nn.functional.embedding(positions, weight)
        else:
            return None
        if self._table is None:
            x: Tensor = self._wte(ids)
            return x + places
        if not _within(ids, self._table.rows):
            return None
        return products.decode_rows(self._table, ids.reshape(-1)).view(*ids.shape, -1).add_(places)

    def logits(self, x: Tensor, last: int) -> Tensor:
        """Of the last positions of x[B, T, C], `[B, last, V]`."""
        norm, product = self._norm, self._product
        with _alone(x.shape[0] * x.shape[1]):
            x = torch.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)[:, -last:]
        if product is None:
            y: Tensor = self._head(x)
            return y
        y = products.multiply(x.reshape(-1, self.width), product.weight, product.bias, product.int8)
        return y.view(*x.shape[:2], -1)


def _alone(rows: int) -> AbstractContextManager[None]:
    """For torch's operations on so many rows, each of which it may give a thread: it is given one for all."""
    return TorchAlone() if rows > 1 else nullcontext()


def _within(numbers: Tensor, limit: int) -> bool:
    """Whether a few numbers are 0 to limit - 1; in torch, that would be four operations."""
    return all(0 <= number < limit for number in numbers.flatten().tolist())
