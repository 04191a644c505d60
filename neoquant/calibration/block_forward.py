"""Calibration samples through a model, one block at a time, stage by stage.

A stage is the layers of a block that see the same inputs. Whoever quantizes replaces their weights before asking for
the next stage, so that every layer sees what the layers quantized before it give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from neoquant.calibration.hidden_states import HiddenStates
from neoquant.model.gpt_neo import AttentionMasks, Block
from neoquant.model.names import SHARED_INPUTS


@dataclass(frozen=True)
class Stage:
    """Linear layers of a block that see the same inputs.

    `linears` by their names in the block; `inputs` gives those inputs batch by batch, float32[B, T, I], anew each time
    it is called.
    """

    linears: dict[str, nn.Linear]
    inputs: Callable[[], Iterator[Tensor]]

    @property
    def in_features(self) -> int:
        return next(iter(self.linears.values())).in_features


class BlockForward:
    """Hidden states [R, T, C] on their way through the model.

    Each layer's inputs are computed once, but for the inner activations of the MLP, which are four times as wide and so
    are computed again if they are many.
    """

    def __init__(self, hidden: HiddenStates, window_size: int, keep_inner: bool = False) -> None:
        """`hidden` the embedded rows, which are used up; `keep_inner`: whether inner activations are kept."""
        self.hidden, self.keep_inner = hidden, keep_inner
        self.masks = AttentionMasks(hidden.shape[1], hidden.shape[1], window_size, None, hidden.device)

    def stages(self, block: Block) -> Iterator[Stage]:
        """The stages of `block` in the order of computing; after the last, `hidden` is what the block gives.

        Each stage's inputs are valid until the next one is asked for.
        """
        attention, mlp, hidden = block.attn.attention, block.mlp, self.hidden
        context = hidden.empty_like()  # what out_proj sees

        def inner() -> Iterator[Tensor]:
            return (mlp.act(mlp.c_fc(block.ln_2(x))) for x in hidden.batches())

        yield _stage(block, 0, lambda: (block.ln_1(x) for x in hidden.batches()))
        context.replace(attention.context(block.ln_1(x), self.masks, None) for x in hidden.batches())
        yield _stage(block, 1, context.batches)
        hidden.replace(x.add_(attention.out_proj(y)) for x, y in zip(hidden.batches(), context.batches(), strict=True))
        context.close()
        yield _stage(block, 2, lambda: (block.ln_2(x) for x in hidden.batches()))
        kept = list(inner()) if self.keep_inner else None
        activations = inner if kept is None else kept.__iter__
        yield _stage(block, 3, activations)
        hidden.replace(x.add_(mlp.c_proj(y)) for x, y in zip(hidden.batches(), activations(), strict=True))


def _stage(block: Block, number: int, inputs: Callable[[], Iterator[Tensor]]) -> Stage:
    linears = {}
    for name in SHARED_INPUTS[number]:
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linears[name] = linear
    return Stage(linears, inputs)
