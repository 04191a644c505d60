"""What the outputs of layers lack, in the model that is being quantized, of what they are in the unquantized one.

Layers that are quantized already change what a layer sees: x instead of x'. With its own weight w it would give w x,
and lack e = w (x' - x). The weight that makes up for it best, in least squares, is w + S H**-1 with S = 2/n sum of
e xᵀ, and H = 2/n sum of x xᵀ, which GPTQ has. What out_proj and c_proj give is added to the hidden states, so that they
can also make up for what those lack. GPTAQ (Li et al., arXiv:2504.02692) and Qronos (Zhang et al., arXiv:2505.11695)
correct in the same sense.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from neoquant.calibration.block_forward import BlockForward, Stage

ADDED = ("attn.attention.out_proj", "mlp.c_proj")
"""The layers whose output is added to the hidden states."""


class MissingOutput:
    """S of each layer of a stage."""

    def __init__(self, stage: Stage, forward: BlockForward, twin: Stage, reference: BlockForward) -> None:
        """`twin` is the same stage of the unquantized model, and `reference` what takes samples through that."""
        self.stage, self.twin = stage, twin
        self.hidden, self.aim = forward.hidden, reference.hidden
        self.added = any(name in ADDED for name in stage.linears)
        assert not self.added or len(stage.linears) == 1
        self._tokens, self._sum = 0, Tensor()

    def gather(self) -> Iterator[Tensor]:
        """The stage's inputs, float32[B, T, I], batch by batch, which are added up on the way."""
        pairs = zip(self.stage.inputs(), self.twin.inputs(), strict=True)
        states = zip(self.hidden.batches(), self.aim.batches(), strict=True)
        for x, theirs in pairs:
            missing = theirs - x
            if self.added:
                (linear,) = self.stage.linears.values()
                hidden, aim = next(states)
                missing = F.linear(missing, linear.weight).add_(aim).sub_(hidden)
            yield x
            product = missing.flatten(0, -2).T @ x.flatten(0, -2)
            self._sum = self._sum.add_(product) if self._tokens else product
            self._tokens += x[..., 0].numel()

    def of(self, name: str) -> Tensor:
        """S[O, I] of a layer, by its name, whose weight is as it was."""
        mean = self._sum * (2 / self._tokens)
        return mean if self.added else self.stage.linears[name].weight.detach() @ mean
