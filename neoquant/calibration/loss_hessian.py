"""Output-side Hessians of all linears of a block: by how much errors in what they give change the model's predictions.

With g the gradient of the model's loss at a layer's output, for labels that are drawn from the model's own predictions,
the mean of g gᵀ is the Fisher information at that output, and the Hessian of the KL divergence from the unchanged model
(Martens, arXiv:1412.1193). With H of the layer's inputs it makes the Kronecker-factored curvature of the layer's weight
(Martens & Grosse, arXiv:1503.05671), as YAQA (Tseng et al., arXiv:2505.22988) and GuidedQuant (Kim et al.,
arXiv:2505.07004) round by. One label for each position is enough: four changed nothing that could be measured.

The gradients run from the head back, one block in memory at a time, each computed again from the block's input.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neoquant.model.gpt_neo import AttentionMasks, Block

POSITIONS = 512  # whose logits are alive at once


def drawn_uniforms(rows: int, length: int, seed: int) -> Tensor:
    """What labels are drawn by: float32[rows, length] in [0, 1), the same however the rows are dealt with."""
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(seed))


def gradient_at_head(x: Tensor, ln_f: nn.LayerNorm, table: Tensor, uniform: Tensor) -> Tensor:
    """Of the sum over positions of -log p(label), by the hidden states x[B, T, C] behind the last block: [B, T, C].

    Args:
        x: see above.
        ln_f: the final norm.
        table: the head's weight, [V, C].
        uniform: [B, T] in [0, 1): the label is where the predicted probabilities, added up by number, pass it.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        h = ln_f(x)
    flat, uniforms = h.detach().flatten(0, 1), uniform.flatten()
    gradient = torch.empty_like(flat)
    for start in range(0, len(flat), POSITIONS):
        some = slice(start, start + POSITIONS)
        p = (flat[some] @ table.T).softmax(1)
        p.scatter_add_(1, draw_labels(p, uniforms[some])[:, None], p.new_full((len(p), 1), -1.0))
        gradient[some] = p @ table
    found: Tensor = torch.autograd.grad(h, x, gradient.view_as(h))[0]
    return found


def draw_labels(p: Tensor, uniform: Tensor) -> Tensor:
    """int64[N]: of each row of p[N, V], where its running sum passes uniform[N] of the whole."""
    total = p.cumsum(1)
    place = uniform.to(p.dtype)[:, None] * total[:, -1:]
    return torch.searchsorted(total, place, right=True)[:, 0].clamp_(max=p.shape[1] - 1)


def gradients_in_block(
    block: Block, x: Tensor, gradient: Tensor, masks: AttentionMasks, names: tuple[str, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradients at the block's input x[B, T, C], and at the outputs [B, T, O] of its layers `names`.

    `gradient`[B, T, C] is that at the block's output.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> None:
        def hook(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            outputs[name] = output

        handles.append(block.get_submodule(name).register_forward_hook(hook))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for name in names:
        keep(name)
    try:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = block(x, masks)
    finally:
        for handle in handles:
            handle.remove()
    at_input, *at_outputs = torch.autograd.grad(y, [x, *(outputs[name] for name in names)], gradient)
    return at_input, dict(zip(names, at_outputs, strict=True))
