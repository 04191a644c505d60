"""transformers' block, taking new positions in one call of the native library where nothing listens in.

Keys and values stay where transformers keeps them, in its `DynamicCache`, whose tensors are views of buffers with room
for what comes: written in place as long as they are the very tensors left there, copied once where they are not (beams
that were reordered, a cache that was cropped or copied).
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.models.gpt_neo import modeling_gpt_neo

from neoquant.model.stored_states import StoredStates
from neoquant.native.step import ACTIVATIONS
from neoquant.nn.fused_block import Anatomy, Parts, PreparedBlock, prepared_block
from neoquant.nn.linear import is_hooked, is_traced


class GPTNeoBlock(modeling_gpt_neo.GPTNeoBlock):  # type: ignore[misc]  # transformers need not be there
    """transformers' own, whose name it keeps: that is what transformers and accelerate keep in one piece by."""

    def forward(
        self,
        hidden_states: Tensor,
        layer_past: Any = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        head_mask: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`hidden_states[B, T, C]` to [B, T, C], and the attention weights where they are asked for."""
        if not (output_attentions or head_mask is not None or is_traced()):
            y = _step(self, hidden_states, layer_past, attention_mask)
            if y is not None:
                return y, None
        if head_mask is not None:  # which newer versions do not know
            others["head_mask"] = head_mask
        given = {"layer_past": layer_past, "attention_mask": attention_mask, "use_cache": use_cache}
        return modeling_gpt_neo.GPTNeoBlock.forward(  # type: ignore[no-any-return]  # compilers trip over `super`
            self, hidden_states, output_attentions=output_attentions, **given, **others
        )


def use_fused_blocks(model: nn.Module) -> None:
    """Let a transformers model's blocks be such."""
    for module in model.modules():
        if type(module) is modeling_gpt_neo.GPTNeoBlock:
            module.__class__ = GPTNeoBlock


def _step(block: GPTNeoBlock, x: Tensor, cache: Any, mask: Tensor | None) -> Tensor | None:
    """x[B, T, C] through the block, its keys and values added to the cache; or None, and nothing done.

    `mask` is what transformers' model makes for eager attention, float[B, 1, T, S] to be added, or None.
    """
    prepared = prepared_block(block, x, mask, anatomy)
    if prepared is None or 0 in x.shape or not (cache is None or _is_ordinary(cache)):
        return None
    attention = block.attn.attention
    if any(map(is_hooked, (block.mlp.act, block.mlp.dropout, attention.attn_dropout, attention.resid_dropout))):
        return None
    shape = prepared.states_of(*x.shape[:2])
    held = 0 if cache is None else cache.get_seq_length(prepared.layer)
    known, keep = (True, None) if mask is None else _padding_of(mask, shape[0], shape[2], held)
    if not known:
        return None
    if cache is None:
        return prepared.step(x, StoredStates(x.new_empty(shape)), StoredStates(x.new_empty(shape)), 0, keep)
    layer = _layer_of(cache, prepared, x)
    if layer is None:
        return None
    buffers = _with_room(layer, shape, held)
    if buffers is None:
        return None
    y = prepared.step(x, StoredStates(buffers.keys), StoredStates(buffers.values), held, keep)
    end = held + shape[2]
    layer.keys, layer.values = buffers.keys[:, :, :end], buffers.values[:, :, :end]
    _BUFFERS[layer] = buffers._replace(left=(ref(layer.keys), ref(layer.values)))
    return y


def anatomy(parts: Parts) -> Anatomy:
    """What the library is told of transformers' block."""
    attention = parts.attention
    config = attention.config
    return Anatomy(
        layer=attention.layer_id,
        heads=attention.num_heads,
        window=config.window_size if parts.attn.attention_type == "local" else None,
        activation=_activation(parts.mlp.act, config.activation_function),
        epsilons=(parts.ln_1.eps, parts.ln_2.eps),
        is_plain=type(attention) is modeling_gpt_neo.GPTNeoSelfAttention,
    )


def _activation(act: nn.Module, stated: str) -> str | None:
    """The name of an MLP's activation; None where it is not the one that config.json states, or not the library's."""
    return stated if stated in ACTIVATIONS and type(act) is _class_of(stated) else None


@cache
def _class_of(activation: str) -> type:
    return type(ACT2FN[activation])


def _is_ordinary(cache: Any) -> bool:
    return type(cache) is DynamicCache and not getattr(cache, "offloading", False)


class _Buffers(NamedTuple):
    """Keys and values [B, H, capacity, D] of a cache's layer, and the views of them that were left there."""

    keys: Tensor
    values: Tensor
    left: tuple[ReferenceType[Tensor], ReferenceType[Tensor]] | None = None


_BUFFERS: WeakKeyDictionary[DynamicLayer, _Buffers] = WeakKeyDictionary()


def _layer_of(cache: DynamicCache, prepared: PreparedBlock, x: Tensor) -> DynamicLayer | None:
    """The cache's layer, with tensors in it; None for one of another kind."""
    number = prepared.layer
    if number >= len(cache.layers) or not cache.layers[number].is_initialized:
        rows, heads, _, width = prepared.states_of(*x.shape[:2])
        nothing = x.new_empty(rows, heads, 0, width)
        cache.update(nothing, nothing, number)
    layer = cache.layers[number]
    return layer if type(layer) is DynamicLayer else None


def _with_room(layer: DynamicLayer, shape: tuple[int, int, int, int], held: int) -> _Buffers | None:
    """Buffers that hold what the layer holds, and have room for new positions, (B, H, T, D).

    None where what it holds is not of such positions, or not float32 on the CPU.
    """
    rows, heads, new, width = shape
    buffers = _BUFFERS.get(layer)
    if buffers is not None and buffers.left is not None:
        same = buffers.left[0]() is layer.keys and buffers.left[1]() is layer.values
        if same and buffers.keys.shape[2] >= held + new and buffers.keys.shape[0] == rows:
            return buffers
    for states in (layer.keys, layer.values):
        if states.dtype != torch.float32 or states.device.type != "cpu":
            return None
        if held and states.shape != (rows, heads, held, width):
            return None
    room = (rows, heads, _capacity(held + new), width)
    keys, values = torch.empty(room), torch.empty(room)
    if held:
        keys[:, :, :held], values[:, :, :held] = layer.keys, layer.values
    return _Buffers(keys, values)


def _capacity(positions: int) -> int:
    """Room for so many positions, and an eighth more: growing costs a copy, and beams copy at every step."""
    return -(-(positions + positions // 8 + 1) // 32) * 32


_Padding = tuple[bool, Tensor | None]
_LAST: list[tuple[ReferenceType[Tensor], int, tuple[int, int, int], _Padding]] = []  # all blocks share one mask


def _padding_of(mask: Tensor, rows: int, new: int, held: int) -> _Padding:
    """Whether a mask to be added leaves out what is ahead and what is padding, and nothing else; and bool[B, S], False
    on padding, or None where there is none."""
    if mask.is_inference():
        return _read_padding(mask, rows, new, held)
    key = (rows, new, held)
    for known, version, asked, found in _LAST:
        if known() is mask and version == mask._version and asked == key:
            return found
    found = _read_padding(mask, rows, new, held)
    _LAST[:] = [(ref(mask), mask._version, key, found)]
    return found


def _read_padding(mask: Tensor, rows: int, new: int, held: int) -> _Padding:
    total = held + new
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] != new or mask.shape[3] < total:
        return False, None
    if mask.shape[0] not in (1, rows) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        return False, None
    mask = mask[:, 0, :, :total]  # [B, T, S]
    seen = mask if mask.dtype == torch.bool else mask == 0
    keep = seen[:, -1]
    causal = torch.ones(new, total, dtype=torch.bool).tril(held)
    if not torch.equal(seen, causal & keep[:, None]):
        return False, None
    if mask.dtype != torch.bool and not bool((seen | (mask <= torch.finfo(mask.dtype).min)).all()):
        return False, None
    return True, None if bool(keep.all()) else keep.expand(rows, -1).contiguous()
