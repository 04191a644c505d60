"""The walk through the model as it is, and back, before anything is rounded.

First the calibration samples pass through the blocks, and what each block sees is kept in a file: by that layers are
corrected later. Then, for layers that are rounded for the model's loss, its gradients run from the head back, one block
in memory at a time, and leave the output-side Hessians of every layer. What is finished of either is kept, so that an
interrupted walk goes on, to the same bytes (on a GPU up to the order of sums).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from neoquant.calibration.dataset import Calibration
from neoquant.calibration.hidden_states import HiddenStates
from neoquant.calibration.loss_hessian import (
    OutputMoments,
    drawn_uniforms,
    gradient_at_head,
    gradients_in_block,
    shrunk,
)
from neoquant.calibration.memory import PLAIN, CalibrationMemory, Methods, gradient_rows
from neoquant.calibration.share import Share
from neoquant.checkpoint import Checkpoint
from neoquant.errors import CheckpointError, locate
from neoquant.model.config import GPTNeoConfig
from neoquant.model.gpt_neo import AttentionMasks, Block
from neoquant.model.names import BASE_PREFIX, BLOCK_LINEARS
from neoquant.progress import Progress
from neoquant.quantization.plan import Plan
from neoquant.quantization.resume import ResumableRun
from neoquant.quantization.sequential import Calibrating, embed, read_block

Advance = Callable[[float], None]


def needs_gradients(plan: Plan) -> bool:
    """Whether some layer is rounded for the model's loss."""
    return any(row.quantizer is not None and row.quantizer.needs_gradients for row in plan.rows)


def methods_of(plan: Plan) -> Methods:
    """What a plan's calibrated run does beside GPTQ's own."""
    reference = any(row.quantizer is not None and row.quantizer.needs_reference for row in plan.rows)
    return Methods(gradients=needs_gradients(plan), reference=reference)


def gradients_record(plan: Plan, calibration: Calibration) -> dict[str, Any]:
    """What gradients were computed of, for records; empty where none were."""
    if not needs_gradients(plan):
        return {}
    labels = {"rows": gradient_rows(*calibration.ids.shape), "labels": "drawn from the model", "seed": calibration.seed}
    return {"gradients": labels}


def shrunk_hessians(found: Mapping[str, tuple[Tensor, Tensor]], rows: int) -> dict[str, Tensor]:
    """Output-side Hessians as a run keeps them, of so many calibration samples, as layers are rounded by them."""
    weight = rows // 2 / rows if rows > 1 else 0.5
    return {name: shrunk(first, second, weight) for name, (first, second) in found.items()}


def _halves(share: Share) -> tuple[int, int]:
    """How many of a process's samples that the unquantized model sees are of the first half of all such, and how many
    of the other; one sample alone counts as one of each."""
    if share.firsts == 1:
        return share.first, share.first
    first = sum(number < share.firsts // 2 for number in share.first_numbers)
    return first, share.first - first


def look_at_unquantized(
    checkpoint: Checkpoint,
    plan: Plan,
    calibration: Calibration,
    memory: CalibrationMemory,
    run: ResumableRun,
    progress: Progress,
) -> None:
    """Have `run` hold what is needed of the unquantized model for every block that is not finished: the output-side
    Hessians of its layers, and what it sees.

    Of the samples, the first `gradient_rows` are looked at; labels are drawn by the calibration's seed. Each of several
    processes looks at its share of them, on its own.
    """
    config, methods = GPTNeoConfig.from_dict(checkpoint.config), memory.methods
    last = config.num_layers
    done = run.has_output_hessians(run.finished) if methods.gradients else run.has(f"input-{last}")
    if methods == PLAIN or run.finished == last or done:
        return
    walk = _Walk(checkpoint, plan, config, calibration, memory, run)
    label, steps = ("gradients", 2 * last) if methods.gradients else ("unquantized", last)
    with torch.no_grad(), progress.task(label, total=steps) as advance:
        walk.forward(advance)
        if methods.gradients:
            walk.backward(advance)


def calibrating(
    hidden: HiddenStates, calibration: Calibration, memory: CalibrationMemory, run: ResumableRun
) -> Calibrating:
    """What goes through the model while its blocks are quantized: `hidden`, and what `run` holds of it unquantized."""
    _, length, width = hidden.shape
    share = Share.of(calibration.ids, run.group)
    shape = (share.first, length, width)

    def output_hessians(number: int) -> dict[str, Tensor]:
        found = run.output_hessians(number)
        if run.group.size > 1:  # each is a mean over its process's samples
            counts, totals = _halves(share), (max(1, share.firsts // 2), share.firsts - share.firsts // 2)
            weights = [count / total for count, total in zip(counts, totals, strict=True)]
            add_up = run.group.add_up
            found = {
                name: (add_up(found[name][0] * weights[0]), add_up(found[name][1] * weights[1]))
                for name in sorted(found)
            }
        return shrunk_hessians(found, share.firsts)

    def unquantized(number: int, behind_attention: bool = False) -> HiddenStates:
        kind = "behind" if behind_attention else "input"
        return run.states(f"{kind}-{number}", shape, memory.spilled, hidden.device)

    methods = memory.methods
    return Calibrating(
        hidden,
        share,
        memory.keeps_inner,
        output_hessians if methods.gradients else None,
        unquantized if methods.reference else None,
    )


class _Walk:
    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        config: GPTNeoConfig,
        calibration: Calibration,
        memory: CalibrationMemory,
        run: ResumableRun,
    ) -> None:
        self.checkpoint, self.plan, self.config, self.run, self.memory = checkpoint, plan, config, run, memory
        self.share = Share.of(calibration.ids, run.group)
        self.ids = self.share.first_ids
        length = self.ids.shape[1]
        self.shape = (len(self.ids), length, config.hidden_size)
        self.seed = calibration.seed
        self.device = torch.device(memory.device)
        self.masks = AttentionMasks(length, length, config.window_size, None, self.device)

    def forward(self, advance: Advance) -> None:
        """Keep what every block sees, and what the last one gives, as `input-0` to `input-L`."""
        last = self.config.num_layers
        begun = self.run.reached(last)  # by the walk back, which leaves behind it what it needs no more
        at = last if begun is not None else max(filter(self._has_input, range(last + 1)), default=None)
        if at is None:
            hidden = self.run.new_hidden_states(self.shape, self.memory.spilled, self.device)
            embed(self.checkpoint, self.ids, hidden)
            self.run.keep_states("input-0", hidden)
            at = 0
        elif at < last:
            hidden = self._states(f"input-{at}")
        advance(at)
        for number in range(at, last):
            block = self._block(number)
            self._pass(block, number, hidden)
            self.run.keep_states(f"input-{number + 1}", hidden)
            advance(1)
        if at < last:
            hidden.close()

    def _pass(self, block: Block, number: int, hidden: HiddenStates) -> None:
        """Through a block. Where layers are corrected, what is behind its attention is kept as `behind-0` and so on."""
        if not self.memory.methods.reference:
            hidden.replace(block(x, self.masks) for x in hidden.batches())
            return
        hidden.replace(x + block.attn(block.ln_1(x), self.masks, None) for x in hidden.batches())
        self.run.keep_states(f"behind-{number}", hidden)
        hidden.replace(x + block.mlp(block.ln_2(x)) for x in hidden.batches())

    def backward(self, advance: Advance) -> None:
        """Keep the output-side Hessians of every block, from the last to the first."""
        last = self.config.num_layers
        reached = self.run.reached(last)
        if reached is None:
            reached = last
            self._keep_gradient(last, self._at_head())
        advance(last - reached)
        for number in reversed(range(reached)):
            names = self._names(number)
            width = self.config.hidden_size
            first = None if self.share.firsts == 1 else _halves(self.share)[0]
            moments = {name: OutputMoments(self._outputs(name), width, self.device, first) for name in names}
            self._keep_gradient(number, self._in_block(number, names, moments))
            halves = {name: each.matrices() for name, each in moments.items()}
            self.run.keep_output_hessians(number, {name: (a.cpu(), b.cpu()) for name, (a, b) in halves.items()})
            self.run.drop(f"gradient-{number + 1}")
            if not self.memory.methods.reference:
                self.run.drop(f"input-{number + 1}")
            advance(1)
        self.run.drop("gradient-0")
        if not self.memory.methods.reference:
            self.run.drop("input-0")

    def _has_input(self, number: int) -> bool:
        return self.run.has(f"input-{number}")

    def _states(self, name: str) -> HiddenStates:
        return self.run.states(name, self.shape, self.memory.spilled, self.device)

    def _keep_gradient(self, number: int, batches: Iterator[Tensor]) -> None:
        """Keep the gradient at what block `number` sees, `gradient-L` being that at what the last one gives."""
        gradient = self.run.new_hidden_states(self.shape, self.memory.spilled, self.device)
        gradient.replace(batches)
        self.run.keep_states(f"gradient-{number}", gradient)
        gradient.close()

    def _at_head(self) -> Iterator[Tensor]:
        hidden = self._states(f"input-{self.config.num_layers}")
        ln_f, table = read_head(self.checkpoint, self.config)
        drawn = drawn_uniforms(self.share.firsts, self.ids.shape[1], self.seed, self.share.first_numbers)
        ln_f, table, uniforms = ln_f.to(self.device), table.to(self.device), drawn.to(self.device)
        for number, x in enumerate(hidden.batches()):
            start = number * hidden.batch
            yield gradient_at_head(x, ln_f, table, uniforms[:, start : start + len(x)])
        hidden.close()

    def _in_block(self, number: int, names: tuple[str, ...], moments: dict[str, OutputMoments]) -> Iterator[Tensor]:
        """The gradient at what a block sees, batch by batch; `moments` are shown those at its layers' outputs."""
        block = self._block(number)
        hidden, gradient = self._states(f"input-{number}"), self._states(f"gradient-{number + 1}")
        behind = self._states(f"behind-{number}") if self.memory.methods.reference else None
        middles: Iterator[Tensor | None] = repeat(None) if behind is None else behind.batches()
        for x, at_output, middle in zip(hidden.batches(), gradient.batches(), middles, strict=False):
            at_input, found = gradients_in_block(block, x, at_output, self.masks, names, middle)
            for name, each in found.items():
                moments[name].add(each)
            yield at_input
        for name, summed in moments.items():  # once, as a GPU is waited for
            with locate(f"the gradient at {name} of block {number}"):
                summed.require_finite()
        for states in filter(None, (hidden, gradient, behind)):
            states.close()

    def _names(self, number: int) -> tuple[str, ...]:
        """The layers of a block that are rounded for the loss."""
        wanted = {
            row.name_in_block.removesuffix(".weight")
            for row in self.plan.rows
            if row.block == number and row.quantizer is not None and row.quantizer.needs_gradients
        }
        return tuple(name for name in BLOCK_LINEARS if name in wanted)

    def _outputs(self, name: str) -> int:
        return self.config.inner_size if name == "mlp.c_fc" else self.config.hidden_size

    def _block(self, number: int) -> Block:
        rows = [row for row in self.plan.rows if row.block == number]
        return read_block(self.checkpoint, rows, self.config, number).to(self.device)


def read_head(checkpoint: Checkpoint, config: GPTNeoConfig) -> tuple[nn.LayerNorm, Tensor]:
    """The final norm, and the head's weight, float32[V, C]."""
    names = {name.removeprefix(BASE_PREFIX): name for name in checkpoint.headers}
    ln_f = nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon).requires_grad_(False)
    for leaf, slot in ln_f.named_parameters():
        slot.copy_(checkpoint.read(names[f"ln_f.{leaf}"]))
    return ln_f, checkpoint.read(head_name(checkpoint, config)).float()


def head_name(checkpoint: Checkpoint, config: GPTNeoConfig) -> str:
    """The tensor that is the head's weight: the token embedding where there is no other."""
    names = {name.removeprefix(BASE_PREFIX): name for name in checkpoint.headers}
    tied = config.tie_word_embeddings or "lm_head.weight" not in names
    head = names.get("wte.weight" if tied else "lm_head.weight", names.get("lm_head.weight"))
    if head is None:
        raise CheckpointError("lacks its embeddings")
    return head
