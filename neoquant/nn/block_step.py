"""What `Block.step` becomes where a model is loaded."""

from __future__ import annotations

from torch import Tensor

from neoquant.model.cache import KVCache
from neoquant.model.gpt_neo import AttentionMasks, Block
from neoquant.nn.fused_block import fused_block
from neoquant.nn.triton_block import triton_block


def block_step(block: Block, x: Tensor, masks: AttentionMasks, cache: KVCache | None) -> Tensor | None:
    """x[B, T, C] through `block`, by what is fast on x's device: [B, T, C]; None where that does not do it."""
    return (triton_block if x.device.type == "cuda" else fused_block)(block, x, masks, cache)
