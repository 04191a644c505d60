"""New positions through a block, in one call of the native library.

Generating is hundreds of steps of one position, and in each the operations between a block's products (norms,
attention to what is held, the activation) take longer to be called one by one than to be done. Where many positions are
read, they take less memory and time, for the rows go through them a piece at a time. `fused_block` is what `Block.step`
becomes on a CPU; it gives None for everything that it does not do, and the block goes its ordinary way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from neoquant.kernels import Cpu
from neoquant.model.cache import KVCache
from neoquant.model.gpt_neo import AttentionMasks, Block
from neoquant.model.stored_states import StoredStates
from neoquant.native import TorchAlone, products
from neoquant.native.step import (
    ACTIVATIONS,
    STORED,
    CachedStates,
    NativeBlock,
    NativeBlocks,
    NativeLinear,
    outruns_torch,
)
from neoquant.nn.linear import QuantLinear, StoredLinear, is_hooked, is_native, is_traced


def fused_block(block: Block, x: Tensor, masks: AttentionMasks, cache: KVCache | None) -> Tensor | None:
    """x[B, T, C] through `block`: [B, T, C], with its keys and values added to `cache`; or None, and nothing done.

    None is given unless the native library runs all six linear layers in float32, nothing intercepts (hooks, adapters,
    gradients, compilers), attention is the ordinary one, and the cache holds what float32 on the CPU left there.
    """
    if is_traced():
        return None
    prepared = prepared_block(block, x, masks.keep, anatomy)
    if prepared is None:
        return None
    rows, positions, _ = x.shape
    shape = prepared.states_of(rows, positions)
    if not belongs(masks, rows, positions, 0 if cache is None else cache.length):
        return None
    if cache is None:
        keys, values = (StoredStates(x.new_empty(shape)) for _ in range(2))
        held = 0
    else:
        keys, values, held = cache.room(prepared.layer, shape, x)
        if not (has_room(keys, shape) and has_room(values, shape)):
            return None
    keep = masks.kept(held + positions)
    y = prepared.step(x, keys, values, held, None if keep is None else by_rows(keep.expand(rows, -1)))
    if cache is None:
        return y
    with TorchAlone():  # where buffers slide
        cache.advance(prepared.layer, positions)
    return y


class Parts(NamedTuple):
    """The modules of a block that its settings are read from."""

    attn: Any
    attention: Any
    mlp: Any
    ln_1: Any
    ln_2: Any

    @classmethod
    def of(cls, block: Any) -> Parts:
        return cls(block.attn, block.attn.attention, block.mlp, block.ln_1, block.ln_2)


class Anatomy(NamedTuple):
    """What of a block's settings the library is told; `window` None is global attention."""

    layer: int
    heads: int
    window: int | None
    activation: str | None
    epsilons: tuple[float, float]
    is_plain: bool
    """Whether attention is computed in the ordinary way."""


def anatomy(parts: Parts) -> Anatomy:
    """That of the network's own block."""
    attention = parts.attention
    window = attention.window_size if attention.local else None
    epsilons = (parts.ln_1.eps, parts.ln_2.eps)
    plain = attention.implementation == "sdpa"
    return Anatomy(attention.layer, attention.num_heads, window, parts.mlp.activation, epsilons, plain)


def prepared_block(
    block: Any, x: Tensor, keep: Tensor | None, anatomy: Callable[[Parts], Anatomy]
) -> PreparedBlock | None:
    """The block as the library takes it, where it may take x[B, T, C] through it; else None.

    `block` is GPT-Neo's with its modules' usual names, its settings read by `anatomy`; `keep` is False on padding.
    """
    prepared = described(block, anatomy) if is_ordinary(x, keep) else None
    if prepared is None:
        _PREPARED.pop(block, None)  # it may be all that keeps weights in memory that were replaced
        return None
    rows, positions, width = x.shape
    if width != prepared.width or (prepared.plain and rows * positions > FEW and not outruns_torch()):
        return None
    return prepared


def described(block: Any, anatomy: Callable[[Parts], Anatomy]) -> PreparedBlock | None:
    """The block as the library takes it, described anew where anything has changed; or None."""
    prepared = _PREPARED.get(block)
    if prepared is None or not prepared.holds(block):
        prepared = _prepare(block, anatomy)
        if prepared is not None:
            _PREPARED[block] = prepared
    return prepared


def belongs(masks: AttentionMasks, rows: int, positions: int, held: int) -> bool:
    """Whether the masks are of so many new positions behind so many held ones, of which there are some."""
    if rows == 0 or positions == 0 or (positions, held + positions) != (masks.T, masks.S):
        return False
    return is_padding_mask(masks.keep, rows, masks.S)


def is_padding_mask(keep: Tensor | None, rows: int, positions: int) -> bool:
    """Whether padding is said of so many rows, or of one for all, and of so many positions; or of none (None)."""
    return keep is None or (keep.dtype == torch.bool and keep.shape in ((rows, positions), (1, positions)))


def is_ordinary(x: Tensor, keep: Tensor | None) -> bool:
    """Whether a block is asked for a result and nothing else, in float32 on the CPU."""
    if type(x) is not Tensor or x.ndim != 3 or _has_any_global_hook():  # type: ignore[no-untyped-call]
        return False
    if x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_grad_enabled():
        return False
    if is_traced() or torch.is_autocast_enabled("cpu"):
        return False
    return keep is None or keep.device.type == "cpu"


def has_room(stored: StoredStates, shape: tuple[int, ...]) -> bool:
    """Whether a cache's buffer [B, H, capacity, D] is as the library takes it: it may be another model's, or type's."""
    buffer = stored.data
    fits = buffer.dtype in STORED and buffer.device.type == "cpu" and buffer.is_contiguous()
    return fits and (*buffer.shape[:2], buffer.shape[3]) == (*shape[:2], shape[3])


class Watched:
    """What a description for the library rests on, to be looked at again: modules, their hooks and kernels, where their
    tensors lie. What a module is made with, as its number of heads, is fixed.

    Asking each tensor where it lies takes a microsecond.
    """

    def __init__(self, parents: Iterable[nn.Module], modules: Sequence[nn.Module]) -> None:
        """`parents` are those whose children may be among the `modules`."""
        self._modules = [
            (parent._modules, name, module, module.__dict__)
            for parent in parents
            for name, module in parent._modules.items()
            if module in modules
        ]
        self._kernels = [
            (layer, layer.kernel, layer.compute_dtype) for layer in modules if isinstance(layer, QuantLinear)
        ]
        held = [tensors for module in modules for tensors in (module._parameters, module._buffers)]
        self._held, self._counts = held, list(map(len, held))
        self._tensors = [
            (tensors, name, tensor, None if tensor is None else tensor.data_ptr())
            for tensors in held
            for name, tensor in tensors.items()
        ]

    def holds(self) -> bool:
        """Whether nothing has changed."""
        for modules, name, module, own in self._modules:
            hooked = own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own  # is_hooked, thrice as fast
            if hooked or modules.get(name) is not module:
                return False
        for layer, kernel, dtype in self._kernels:
            if layer.kernel is not kernel or layer.compute_dtype != dtype:
                return False
        if list(map(len, self._held)) != self._counts:
            return False
        for tensors, name, tensor, address in self._tensors:
            if tensors.get(name) is not tensor or (tensor is not None and tensor.data_ptr() != address):
                return False
        return True


class PreparedBlock:
    """A block's description for the library, and what it rests on. Describing it takes as long as computing with it."""

    def __init__(
        self, block: Any, anatomy: Callable[[Parts], Anatomy], native: NativeBlock, modules: list[nn.Module]
    ) -> None:
        self._parts, self._read = Parts.of(block), anatomy
        self.anatomy = anatomy(self._parts)
        self.layer, self.native = self.anatomy.layer, native
        self.width = native.layers[0].weight.columns
        self._heads, self._size = self.anatomy.heads, self.width // self.anatomy.heads
        self.plain = not any(isinstance(module, QuantLinear) for module in modules)
        self._alone = NativeBlocks([native])
        self._watched = Watched((block, *modules), modules)

    def states_of(self, rows: int, positions: int) -> tuple[int, int, int, int]:
        """The shape of keys, and of values, of so many rows and positions: [B, H, T, D]."""
        return rows, self._heads, positions, self._size

    def step(self, x: Tensor, keys: StoredStates, values: StoredStates, held: int, keep: Tensor | None) -> Tensor:
        """x[B, T, C] to [B, T, C]; keys and values of the positions are added from `held` on.

        Buffers of `keys` and `values` [B, H, capacity, D] are contiguous; `keep` bool[B, held + T] is False on padding,
        and its rows are contiguous.
        """
        cached = CachedStates(1)
        cached.hold(0, keys, values)
        cached.count(0, held, 0)
        return self._alone.step(x, cached, keep)

    def holds(self, block: Any) -> bool:
        """Whether nothing has changed, and nothing is trained."""
        if _is_training(block, self._parts) or self._read(self._parts) != self.anatomy:
            return False
        return self._watched.holds()


def _is_training(block: Any, parts: Parts) -> bool:
    training: bool = block.training or parts.attention.training or parts.mlp.training
    return training


FEW = 8  # rows that meet a plain weight faster here than in torch, whatever the instruction set

# Not in the blocks, which may be copied and pickled.
_PREPARED: WeakKeyDictionary[nn.Module, PreparedBlock] = WeakKeyDictionary()


def _prepare(block: Any, anatomy: Callable[[Parts], Anatomy]) -> PreparedBlock | None:
    """See prepared_block; None where the block is not one that the library takes."""
    parts = Parts.of(block)
    attention, mlp, found = parts.attention, parts.mlp, anatomy(parts)
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, mlp.c_fc, mlp.c_proj]
    norms = [parts.ln_1, parts.ln_2]
    modules = [parts.attn, attention, mlp, *linears, *norms]
    activation = ACTIVATIONS.get(found.activation or "")
    if activation is None or not found.is_plain or _is_training(block, parts) or any(map(is_hooked, modules)):
        return None
    if not all(map(is_taken, linears)):
        return None
    layers = [packed(linear) for linear in linears]
    width, inner = layers[0].weight.columns, layers[4].weight.rows
    shapes = [(layer.weight.rows, layer.weight.columns) for layer in layers]
    if shapes != [(width, width)] * 4 + [(inner, width), (width, inner)] or width % found.heads:
        return None
    if not all(is_plain_norm(norm, width) for norm in norms):
        return None
    native = NativeBlock(
        layers,
        [tensor for norm in norms for tensor in (norm.weight, norm.bias)],
        found.epsilons,
        heads=found.heads,
        window=found.window,
        activation=activation,
    )
    return PreparedBlock(block, anatomy, native, modules)


def is_taken(layer: nn.Module) -> bool:
    """Whether the library takes a layer, or it is another's."""
    if isinstance(layer, QuantLinear):
        exact = layer.compute_dtype in (None, torch.float32)
        taken = isinstance(layer.kernel, Cpu) and exact and not layer.ordered and layer.qweight.device.type == "cpu"
    else:
        taken = type(layer) in (nn.Linear, StoredLinear) and is_native(layer.get_parameter("weight"))
    bias = layer._parameters.get("bias")
    return taken and (bias is None or _is_vector(bias, layer.out_features))  # type: ignore[arg-type]


def packed(layer: nn.Module) -> NativeLinear:
    """A layer as the library takes it."""
    bias = layer._parameters.get("bias")
    if isinstance(layer, QuantLinear) and isinstance(layer.kernel, Cpu):
        weight = layer.kernel.native(layer.state, layer.grid, layer.shape)
        return NativeLinear(weight, bias, layer.kernel.activations == "int8")
    return NativeLinear(products.plain(layer.get_parameter("weight")), bias, False)


def is_plain_norm(norm: nn.LayerNorm, width: int) -> bool:
    return type(norm) is nn.LayerNorm and _is_vector(norm.weight, width) and _is_vector(norm.bias, width)


def _is_vector(tensor: Tensor | None, length: int) -> bool:
    """Whether a tensor is float32[length], lying in one line on the CPU."""
    if tensor is None or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        return False
    return tensor.shape == (length,) and tensor.is_contiguous()


def by_rows(keep: Tensor) -> Tensor:
    """A mask whose rows are contiguous."""
    return keep if keep.stride(1) == 1 else keep.contiguous()
