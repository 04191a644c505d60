"""How far a model's predictions are from another's: KL divergence of what comes next, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

POSITIONS = 512  # whose logits are alive at once


def prediction_loss(h: Tensor, head: Tensor, wanted: Tensor, wanted_head: Tensor) -> Tensor:
    """The mean over positions of KL(wanted || predicted) in nats, a scalar that has a gradient for `h`.

    Args:
        h: hidden states behind the final norm, float32[..., C].
        head: the head's weight, float32[V, C].
        wanted: those of the model that is aimed at, float32[..., C'].
        wanted_head: its head's weight, float32[V, C'].
    """
    loss: Tensor = _Divergence.apply(h, head, wanted, wanted_head)  # type: ignore[no-untyped-call]  # torch's own
    return loss


class _Divergence(torch.autograd.Function):
    """Logits of few positions are alive at once: the gradient is computed beside the loss."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, head: Tensor, wanted: Tensor, wanted_head: Tensor) -> Tensor:
        states, aims = h.flatten(0, -2), wanted.flatten(0, -2)
        gradient = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, len(states), POSITIONS):
            some = slice(start, start + POSITIONS)
            predicted = (states[some] @ head.T).log_softmax(-1)
            aim = (aims[some] @ wanted_head.T).log_softmax(-1)
            p = aim.exp()
            total += (p * aim.sub_(predicted)).sum(dtype=torch.float64)
            if gradient is not None:
                torch.mm(predicted.exp_().sub_(p), head, out=gradient[some])
        if gradient is not None:
            ctx.save_for_backward(gradient.div_(len(states)).view_as(h))
        return (total / len(states)).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.saved_tensors[0] * grads[0], None, None, None
