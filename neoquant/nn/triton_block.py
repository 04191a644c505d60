"""New positions through a block on a GPU, in as few launches as Triton's programs make of it.

Query, key and value are one launch; bias, activation and residual belong to the product before them; where keys and
values lie in rings (a static cache), attention is one launch, which also writes there. `triton_block` is what
`Block.step` becomes on a GPU; it gives None for everything that it does not do, and the block goes its ordinary way.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from neoquant.kernels import Triton
from neoquant.kernels.triton import launch
from neoquant.kernels.triton.kernel import COMPUTED, packed_weight
from neoquant.kernels.triton.launch import PackedWeight
from neoquant.model.cache import KVCache
from neoquant.model.gpt_neo import AttentionMasks, Block, SelfAttention
from neoquant.model.static_cache import StaticCache, StaticMasks
from neoquant.nn.linear import QuantLinear, is_hooked


def triton_block(block: Block, x: Tensor, masks: AttentionMasks, cache: KVCache | StaticCache | None) -> Tensor | None:
    """x[B, T, C] through `block`: [B, T, C], with its keys and values added to `cache`; or None, and nothing done.

    None is given unless B T is at most `launch.SOME`, all six linear layers are quantized ones that Triton's programs
    run exactly, in x's type, and nothing listens in or is compiled: hooks, gradients, dropout.
    """
    attention, mlp = block.attn.attention, block.mlp
    linears = [
        attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, mlp.c_fc, mlp.c_proj,
    ]  # fmt: skip
    modules = [block.attn, attention, mlp, block.ln_1, block.ln_2, *linears]
    if not _is_ordinary(block, x) or any(map(is_hooked, modules)):
        return None
    weights = [weight for layer in linears if (weight := _weight(layer, x)) is not None]
    if len(weights) < len(linears):
        return None
    *projections, out_proj, c_fc, c_proj = weights
    flat = x.reshape(-1, x.shape[2])
    context = _attended(attention, projections, block.ln_1(flat), x.shape, masks, cache)
    flat = launch.multiply(context, out_proj, _bias(attention.out_proj, x), residual=flat)
    inner = launch.multiply(block.ln_2(flat), c_fc, _bias(mlp.c_fc, x), mlp.activation)
    return launch.multiply(inner, c_proj, _bias(mlp.c_proj, x), residual=flat).view(x.shape)


def _attended(
    attention: SelfAttention,
    weights: list[PackedWeight],
    x: Tensor,
    shape: torch.Size,
    masks: AttentionMasks,
    cache: KVCache | StaticCache | None,
) -> Tensor:
    """What the heads give of x[B T, C], side by side, `weights` being those of query, key and value: [B T, C]."""
    B, T, C = shape
    if all(weight.is_like(weights[0]) for weight in weights):
        qkv = launch.multiply_by_three(x, weights)
    else:  # mixed precision
        qkv = torch.stack([launch.multiply(x, weight) for weight in weights])
    if isinstance(cache, StaticCache) and isinstance(masks, StaticMasks):
        return launch.attend(qkv, *cache.rings(attention.layer), cache.at, masks.padding)
    query, key, value = (states.view(B, T, attention.num_heads, -1).transpose(1, 2) for states in qkv)
    if cache is not None:
        key, value = cache.update(attention.layer, key, value)
    return attention.attend(query, key, value, masks).transpose(1, 2).reshape(-1, C)


def _bias(layer: nn.Module, x: Tensor) -> Tensor | None:
    bias = layer._parameters.get("bias")
    return None if bias is None else bias.to(x.dtype)


def _is_ordinary(block: Block, x: Tensor) -> bool:
    """Whether few rows are asked to go through the block, for a result and nothing else."""
    if x.ndim != 3 or not 0 < x.shape[0] * x.shape[1] <= launch.SOME or x.dtype not in COMPUTED:
        return False
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cuda"):
        return False
    if block.training or block.attn.attention.training or block.mlp.training:
        return False
    known = block.mlp.activation in launch.ACTIVATIONS and block.attn.attention.implementation == "sdpa"
    return known and not _has_any_global_hook()  # type: ignore[no-untyped-call]


def _weight(layer: nn.Module, x: Tensor) -> PackedWeight | None:
    """A layer's weight, if Triton's programs run the layer on x."""
    if type(layer) is not QuantLinear or type(layer.kernel) is not Triton:
        return None
    if layer.compute_dtype not in (None, x.dtype) or not layer.qweight.is_cuda:
        return None
    weight = packed_weight(layer.state, layer.grid, layer.shape)
    return weight if weight.arrangement.aligned else None
