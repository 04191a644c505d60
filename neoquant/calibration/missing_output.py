"""What the outputs of layers lack, in the model that is being quantized, of what they are in the unquantized one.

Layers that are quantized already change what a layer sees: x instead of x'. With its own weight w it would give w x,
and lack e = w (x' - x). The weight that makes up for it best, in least squares, is w + S H**-1 with S = 2/n sum of
e xᵀ, and H = 2/n sum of x xᵀ, which GPTQ has. What out_proj and c_proj give is added to the hidden states, so that they
can also make up for what those lack. GPTAQ (Li et al., arXiv:2504.02692) and Qronos (Zhang et al., arXiv:2505.11695)
correct in the same sense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from neoquant.calibration.block_forward import Stage
from neoquant.calibration.hidden_states import HiddenStates
from neoquant.model.gpt_neo import Block

ADDED = ("attn.attention.out_proj", "mlp.c_proj")
"""The layers whose output is added to the hidden states."""


class UnquantizedBlock:
    """Hidden states of the unquantized model, float32[R, T, C]: `before` a block, `behind` its attention, `after` it.

    Of the first calibration samples only, where that is enough.
    """

    def __init__(self, block: Block, before: HiddenStates, behind: HiddenStates, after: HiddenStates) -> None:
        self.before, self.behind, self.after = before, behind, after
        self._norms = block.ln_1, block.ln_2

    def aims(self, name: str) -> Iterator[Tensor]:
        """What a layer should see, or, if its output is added, what it should lead to, batch by batch."""
        if name in ADDED:
            return (self.behind if name == ADDED[0] else self.after).batches()
        first, second = self._norms
        if name.startswith("attn."):
            return (first(x) for x in self.before.batches())
        return (second(x) for x in self.behind.batches())

    def close(self) -> None:
        """Let go of all but those after the block."""
        self.before.close()
        self.behind.close()


class MissingOutput:
    """S of each layer of a stage."""

    def __init__(self, stage: Stage, hidden: HiddenStates, unquantized: UnquantizedBlock) -> None:
        """`hidden` are the states that the stage's output would be added to."""
        self.stage, self.hidden, self.unquantized = stage, hidden, unquantized
        self.name, self.linear = next(iter(stage.linears.items()))
        assert self.name not in ADDED or len(stage.linears) == 1
        self._tokens, self._sum = 0, Tensor()

    def gather(self) -> Iterator[Tensor]:
        """The stage's inputs, float32[B, T, I], batch by batch, which are added up on the way."""
        aims, states = self.unquantized.aims(self.name), self.hidden.batches()
        for x in self.stage.inputs():
            yield x
            aim = next(aims, None)
            if aim is not None:
                x = x[: len(aim)]
                reached = x if self.name not in ADDED else self._given(x).add_(next(states)[: len(aim)])
                product = (aim - reached).flatten(0, -2).T @ x.flatten(0, -2)
                self._sum = self._sum.add_(product) if self._tokens else product
                self._tokens += x[..., 0].numel()

    def add_up(self, total: Callable[[Tensor], Tensor]) -> None:
        """Let it be that of all processes' inputs; `total` is the sum over them."""
        outputs = self.linear.out_features if self.name in ADDED else self.linear.in_features
        if not self._tokens:
            self._sum = self.linear.weight.new_zeros(outputs, self.linear.in_features)
        self._sum = total(self._sum)
        self._tokens = int(total(torch.tensor(self._tokens)))

    def _given(self, x: Tensor) -> Tensor:
        return F.linear(x, self.linear.weight, self.linear.bias)

    def of(self, name: str) -> Tensor:
        """S[O, I] of a layer, by its name, whose weight is as it was."""
        mean = self._sum * (2 / self._tokens)
        return mean if name in ADDED else self.stage.linears[name].weight.detach() @ mean
