"""One new position of each row through a block, in one call of the native library.

Generating is hundreds of such steps, and in each the operations between a block's products (norms, attention to what is
held, the activation) take longer to be called one by one than to be done. `native_step` is what `Block.step` becomes
where a model is loaded; it gives None for everything that it does not do, and the block goes its ordinary way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from neoquant.kernels import Cpu
from neoquant.layer import QuantLinear, StoredLinear, is_native
from neoquant.model.cache import KVCache
from neoquant.model.gpt_neo import AttentionMasks, Block
from neoquant.native import products
from neoquant.native.step import ACTIVATIONS, NativeBlock, Packed


def native_step(block: Block, x: Tensor, masks: AttentionMasks, cache: KVCache) -> Tensor | None:
    """x[B, 1, C] through `block`: [B, 1, C], with its keys and values added to `cache`; or None, and nothing done.

    None is given unless the native library runs all six linear layers in float32, nobody listens in (hooks, adapters,
    gradients), and attention is the ordinary one.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu" or block.training or torch.is_grad_enabled():
        return None
    prepared = _PREPARED.get(block)
    if prepared is None or not prepared.holds():
        prepared = _prepare(block)
        if prepared is None:
            return None
        _PREPARED[block] = prepared
    rows, layer, heads = x.shape[0], prepared.layer, prepared.heads
    keys, values = cache.room(layer, (rows, heads, 1, x.shape[2] // heads), x)
    keep = None if masks.keep is None else _by_rows(masks.keep.expand(rows, -1))
    y = prepared.native.step(x, keys, values, cache.length, keep)
    cache.advance(layer, 1)
    return y


class _Prepared:
    """A block's description for the library, and everything that it rests on, to be looked at again at every step.

    Asking each tensor where it lies takes a microsecond; describing the block takes as long as computing with it.
    """

    def __init__(self, block: Block, native: NativeBlock, modules: list[nn.Module]) -> None:
        attention = block.attn.attention
        self.layer, self.heads, self.native = attention.layer, attention.num_heads, native
        self._modules = [
            (parent._modules, name, module)
            for parent in (block, *modules)
            for name, module in parent._modules.items()
            if module in modules
        ]
        self._kernels = [
            (layer, layer.kernel, layer.compute_dtype, len(layer._buffers))
            for layer in modules
            if isinstance(layer, QuantLinear)
        ]
        self._tensors = [
            (held, name, tensor, tensor.data_ptr())
            for module in modules
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
            if tensor is not None
        ]

    def holds(self) -> bool:
        """Whether nothing has changed."""
        for modules, name, module in self._modules:
            if modules.get(name) is not module or module._forward_hooks or module._forward_pre_hooks:
                return False
        for layer, kernel, dtype, buffers in self._kernels:
            if layer.kernel is not kernel or layer.compute_dtype != dtype or len(layer._buffers) != buffers:
                return False
        for held, name, tensor, address in self._tensors:
            if held.get(name) is not tensor or tensor.data_ptr() != address:
                return False
        return True


# Not in the blocks, which may be copied and pickled.
_PREPARED: WeakKeyDictionary[Block, _Prepared] = WeakKeyDictionary()


def _prepare(block: Block) -> _Prepared | None:
    """See native_step; None where the block is not one that the library takes."""
    attention, mlp = block.attn.attention, block.mlp
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, mlp.c_fc, mlp.c_proj]
    norms = [block.ln_1, block.ln_2]
    modules = [block.attn, attention, mlp, *linears, *norms]
    activation = ACTIVATIONS.get(mlp.activation)
    if activation is None or attention.implementation != "sdpa" or _is_watched(modules):
        return None
    layers = list(_packed(linears))
    if len(layers) < len(linears) or not all(map(_is_plain, norms)):
        return None
    native = NativeBlock(
        layers,
        [tensor for norm in norms for tensor in (norm.weight, norm.bias)],
        (block.ln_1.eps, block.ln_2.eps),
        heads=attention.num_heads,
        window=attention.window_size if attention.local else None,
        activation=activation,
    )
    return _Prepared(block, native, modules)


def _packed(layers: Sequence[nn.Module]) -> Iterator[Packed]:
    """Layers as the library takes them, without those that are another's."""
    for layer in layers:
        bias = layer._parameters.get("bias")
        if bias is not None and bias.dtype != torch.float32:
            continue
        if isinstance(layer, QuantLinear):
            exact = layer.compute_dtype in (None, torch.float32)
            if isinstance(layer.kernel, Cpu) and exact and not layer.ordered:
                packed = layer.kernel.native(layer.state, layer.grid, layer.shape)
                yield Packed(packed, bias, layer.kernel.activations == "int8")
        elif type(layer) in (nn.Linear, StoredLinear) and is_native(weight := layer.get_parameter("weight")):
            yield Packed(products.plain(weight), bias, False)


def _is_plain(norm: nn.LayerNorm) -> bool:
    return type(norm) is nn.LayerNorm and norm.weight.dtype == torch.float32


def _is_watched(modules: Sequence[nn.Module]) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def _by_rows(keep: Tensor) -> Tensor:
    """A mask whose rows are contiguous."""
    return keep if keep.stride(1) == 1 else keep.contiguous()
