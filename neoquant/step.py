"""One new position of each row through a block, in one call of the native library.

Generating is hundreds of such steps, and in each the operations between a block's products (norms, attention to what is
held, the activation) take longer to be called one by one than to be done. `native_step` is what `Block.step` becomes
where a model is loaded; it gives None for everything that it does not do, and the block goes its ordinary way.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neoquant.kernels import Cpu
from neoquant.layer import QuantLinear, StoredLinear, is_native
from neoquant.model.cache import KVCache
from neoquant.model.gpt_neo import AttentionMasks, Block
from neoquant.native import products
from neoquant.native.step import ACTIVATIONS, Packed, step


def native_step(block: Block, x: Tensor, masks: AttentionMasks, cache: KVCache) -> Tensor | None:
    """x[B, 1, C] through `block`: [B, 1, C], with its keys and values added to `cache`; or None, and nothing done.

    None is given unless the native library runs all six linear layers in float32, nobody listens in (hooks, adapters,
    gradients), and attention is the ordinary one.
    """
    attention, mlp = block.attn.attention, block.mlp
    linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, mlp.c_fc, mlp.c_proj)
    norms = (block.ln_1, block.ln_2)
    activation = ACTIVATIONS.get(mlp.activation)
    if x.dtype != torch.float32 or x.device.type != "cpu" or activation is None or attention.implementation != "sdpa":
        return None
    if block.training or torch.is_grad_enabled() or _is_watched(block.attn, attention, mlp, *linears, *norms):
        return None
    layers = [layer for linear in linears if (layer := _packed(linear)) is not None]
    if len(layers) < len(linears) or not all(map(_is_plain, norms)):
        return None
    rows, heads = x.shape[0], attention.num_heads
    keys, values = cache.room(attention.layer, (rows, heads, 1, x.shape[2] // heads), x)
    y = step(
        x,
        layers,
        [tensor for norm in norms for tensor in (norm.weight, norm.bias)],
        (block.ln_1.eps, block.ln_2.eps),
        heads=heads,
        window=attention.window_size if attention.local else None,
        activation=activation,
        keys=keys,
        values=values,
        held=cache.length,
        keep=None if masks.keep is None else _by_rows(masks.keep.expand(rows, -1)),
    )
    cache.advance(attention.layer, 1)
    return y


def _packed(layer: nn.Module) -> Packed | None:
    """A layer as the library takes it, or None where it is another's."""
    if isinstance(layer, nn.Linear):
        ours = type(layer) in (nn.Linear, StoredLinear) and is_native(layer.weight) and _fits(layer.bias)
        return Packed(products.plain(layer.weight), layer.bias, False) if ours else None
    if type(layer) is not QuantLinear or layer.ordered or not isinstance(layer.kernel, Cpu):
        return None
    if layer.compute_dtype not in (None, torch.float32) or (
        layer.bias is not None and layer.bias.dtype != torch.float32
    ):
        return None
    weight = layer.kernel.native(layer.state, layer.grid, layer.shape)
    return Packed(weight, layer.bias, layer.kernel.activations == "int8")


def _fits(bias: Tensor | None) -> bool:
    return bias is None or bias.dtype == torch.float32


def _is_plain(norm: nn.LayerNorm) -> bool:
    return type(norm) is nn.LayerNorm and norm.weight.dtype == torch.float32


def _is_watched(*modules: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def _by_rows(keep: Tensor) -> Tensor:
    """A mask whose rows are contiguous."""
    return keep if keep.stride(1) == 1 else keep.contiguous()
