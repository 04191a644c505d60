"""Adam on what a quantized model holds in floating point, against the predictions of the unquantized one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neoquant.errors import RequestError
from neoquant.model.gpt_neo import AttentionMasks, CausalLM
from neoquant.nn.linear import QuantLinear
from neoquant.tuning.prediction_loss import prediction_loss

TOKENS = 2048  # of a step, about
HELD = 8  # of so many samples one is held out
WARM_UP = 0.1  # of all steps: over these the learning rate rises
BETAS = (0.9, 0.99)  # there are few steps
_HELD = 1 << 29  # bytes of activations; a step with more computes them again for its gradients
_ACTIVATIONS, _INNER = 16, 5  # of a block, of its width and of its MLP's, that its gradient is computed from

Advance = Callable[[float], None]


@dataclass(frozen=True)
class Schedule:
    """steps, and the learning rate, which rises at the beginning and falls to nothing (half a cosine); `seed` of the
    order in which samples are taken."""

    steps: int
    learning_rate: float
    seed: int

    def rate(self, step: int) -> float:
        """That of a step, which are counted from 0."""
        rising = min(1.0, (step + 1) / max(1.0, WARM_UP * self.steps))
        return self.learning_rate * rising * 0.5 * (1 + math.cos(math.pi * step / self.steps))


class Predictor:
    """A causal language model whose predictions are compared: hidden states behind the final norm, and the head."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        for block in model.transformer.h:
            block.step = None  # type: ignore[assignment]  # it knows no gradients
        head: nn.Module = model.lm_head  # which loading may have put in place of the class's own
        table = head.quantized.dequantize(torch.float32) if isinstance(head, QuantLinear) else head.weight
        self.head = cast(Tensor, table).detach().float()

    def states(self, ids: Tensor) -> Tensor:
        """float32[B, T, C] of ids[B, T]."""
        decoder = self.model.transformer
        B, T = ids.shape
        x = decoder.wte(ids) + decoder.wpe(torch.arange(T))
        masks = AttentionMasks(T, T, self.model.config.window_size, None, x.device)
        again = torch.is_grad_enabled() and self._activations(B, T) > _HELD
        for block in decoder.h:
            x = checkpoint(block, x, masks, use_reentrant=False) if again else block(x, masks)
        states: Tensor = decoder.ln_f(x)
        return states

    def _activations(self, rows: int, length: int) -> int:
        """Bytes that gradients of so many samples would be computed from."""
        config = self.model.config
        width = _ACTIVATIONS * config.hidden_size + _INNER * config.inner_size
        return 4 * rows * length * config.num_layers * width


class Samples:
    """Calibration samples, ids[R, T], and what the unquantized model predicts from them.

    The last eighth is held out: no step sees it, and on it the loss is measured. A single sample is both.
    """

    def __init__(self, ids: Tensor, original: Predictor, advance: Advance) -> None:
        """`advance` is told of every sample."""
        self.ids, self.head = ids, original.head
        self.batch = max(1, TOKENS // ids.shape[1])
        self.held = max(1, len(ids) // HELD)
        self.trained = max(1, len(ids) - self.held)
        config = original.model.config
        self.states = torch.empty(*ids.shape, config.hidden_size)
        with torch.no_grad():
            for some in self._batches(0):
                self.states[some] = original.states(ids[some])
                advance(len(ids[some]))

    def passes(self, times: int) -> int:
        """Steps that see every sample so many times, about."""
        return max(1, times * self.trained // self.batch)

    def order(self, seed: int) -> Iterator[Tensor]:
        """Numbers of samples, a batch a step: all that are trained on, then all of them again in another order."""
        generator, waiting = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64)
        batch = min(self.batch, self.trained)
        while True:
            while len(waiting) < batch:
                waiting = torch.cat([waiting, torch.randperm(self.trained, generator=generator)])
            yield waiting[:batch]
            waiting = waiting[batch:]

    def loss(self, predictor: Predictor, some: slice | Tensor) -> Tensor:
        """The mean divergence of some samples' predictions from the unquantized model's, in nats a token."""
        return prediction_loss(predictor.states(self.ids[some]), predictor.head, self.states[some], self.head)

    @torch.no_grad()
    def held_loss(self, predictor: Predictor, advance: Advance) -> float:
        """Of the samples that are held out."""
        total = 0.0
        for some in self._batches(len(self.ids) - self.held):
            rows = len(self.ids[some])
            total += rows * self.loss(predictor, some).item()
            advance(rows)
        return total / self.held

    def _batches(self, first: int) -> Iterator[slice]:
        """Of the samples from number `first` on."""
        return (slice(start, start + self.batch) for start in range(first, len(self.ids), self.batch))


def train(
    predictor: Predictor, parameters: list[nn.Parameter], samples: Samples, schedule: Schedule, advance: Advance
) -> list[float]:
    """Change `parameters` by so many steps; returns the loss of each step's samples before it.

    Raises RequestError where a loss is not finite.
    """
    optimizer = torch.optim.Adam(parameters, lr=schedule.learning_rate, betas=BETAS)
    losses = []
    for step, some in zip(range(schedule.steps), samples.order(schedule.seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        loss = samples.loss(predictor, some)
        if not loss.isfinite():
            raise RequestError(
                f"the loss of step {step + 1} is not finite: give a learning rate below {schedule.learning_rate:g}"
            )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()
        losses.append(loss.item())
        advance(1)
    return losses
