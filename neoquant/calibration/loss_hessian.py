"""Output-side Hessians of all linears of a block: by how much errors in what they give change the model's predictions.

With g the gradient of the model's loss at a layer's output, for labels that are drawn from the model's own predictions,
the mean of g gᵀ is the Fisher information at that output, and the Hessian of the KL divergence from the unchanged model
(Martens, arXiv:1412.1193). With H of the layer's inputs it makes the Kronecker-factored curvature of the layer's weight
(Martens & Grosse, arXiv:1503.05671), as YAQA (Tseng et al., arXiv:2505.22988) and GuidedQuant (Kim et al.,
arXiv:2505.07004) round by. One draw for each position is enough: four changed nothing that could be measured.

The gradients run from the head back, one block in memory at a time, each computed again from the block's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from neoquant.model.gpt_neo import MLP, AttentionMasks, Block
from neoquant.model.names import SHARED_INPUTS
from neoquant.quantizers import Hessian
from neoquant.quantizers.hessian import OutputFactor

POSITIONS = 512  # whose logits are alive at once
COLUMNS = 4096  # of them that one product gives
PARTS = (1.0, 0.1, 0.01, 0.001)  # of an output-side Hessian's diagonal that may be added to it
RIDGE = 0.001  # of its mean diagonal that is added in any case
EVERY = 4  # row of the errors that are looked at for that
BEFORE_ATTENTION, (OUT_PROJ,), (C_FC,), (C_PROJ,) = SHARED_INPUTS
GELU_BY_TANH = ("gelu_new", "gelu_pytorch_tanh")  # their names in config.json


def coupled_rows(rows: int, width: int) -> int:
    """How many rows of a layer are coupled: as many as the model is wide, where that divides them, else all.

    All rows together would take more time than all else for c_fc, whose rows are four times as many.
    """
    return rows if rows % width else width


class OutputMoments:
    """The mean of g gᵀ over gradients g[O] at a layer's output, of each piece of coupled rows, in two halves of the
    samples: these are independent of each other, as the tokens of one are not."""

    def __init__(self, rows: int, width: int, device: torch.device | str = "cpu", first: int | None = None) -> None:
        """`first`: how many samples are the first half; None: there is but one, and each half of it counts as one."""
        self.piece, self.first = coupled_rows(rows, width), first
        self._halves = [[Hessian(self.piece, device) for _ in range(rows // self.piece)] for _ in range(2)]
        self._seen = 0

    def add(self, gradients: Tensor) -> None:
        """Add gradients[B, T, O], a sample in each row; `require_finite` says whether they were finite."""
        if self.first is None:
            parts = gradients.tensor_split(2, dim=1)
        else:
            here = min(max(self.first - self._seen, 0), len(gradients))
            parts = gradients[:here], gradients[here:]
            self._seen += len(gradients)
        for half, part in zip(self._halves, parts, strict=True):
            if part.numel():
                for hessian, some in zip(half, torch.split(part, self.piece, dim=-1), strict=True):
                    hessian.add(some, checked=False)

    def require_finite(self) -> None:
        """Raise FormatError if some gradient that was added was not finite."""
        for first, second in zip(*self._halves, strict=True):
            first.require_finite(second)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """K of each half, float32[O / piece, piece, piece]."""
        first, second = (torch.stack([hessian.matrix for hessian in half]).div_(2) for half in self._halves)
        return first, second


def shrunk(first: Tensor, second: Tensor, weight: float, damping: float = RIDGE) -> Tensor:
    """K[heads, D, D] of all samples, with what lies off its diagonals smaller by the factor that rounding profits from.

    Means over few samples have correlations that others have not. How many is told by cross-validation (Stone, "Cross-
    validatory choice and assessment of statistical predictions", 1974): errors, alike and independent in all rows, are
    compensated by what the first half of the samples says, with each of some parts of its diagonal added to it; taken
    is the part that has the second half lose least. What holds for one piece of coupled rows is taken for all.

    Args:
        first: K of the first half of the samples.
        second: that of the others.
        weight: the part of all samples that the first half has.
        damping: part of the mean diagonal that is added in any case.
    """
    K = weight * first + (1 - weight) * second
    part = chosen_part(first[0], second[0], damping)
    diagonal = K.diagonal(dim1=1, dim2=2).clone()
    K.div_(1 + part).diagonal(dim1=1, dim2=2).copy_(diagonal)
    return K


def chosen_part(first: Tensor, second: Tensor, damping: float) -> float:
    """Of PARTS that of the diagonal of first[D, D] with which second[D, D] loses least; from the largest on, as long as
    they gain."""
    found, least = PARTS[0], float("inf")
    for part in PARTS:
        K = first.clone()
        K.diagonal().mul_(1 + part)
        factor = OutputFactor.of(K[None], damping)
        order, some = factor.row_order[0], factor.unit[0, ::EVERY]
        lost = float((some @ second[order[:, None], order]).mul_(some).sum())
        if not lost < least:
            break
        found, least = part, lost
    return found


def drawn_uniforms(rows: int, length: int, seed: int, numbers: Sequence[int] | None = None) -> Tensor:
    """What both labels of each position are drawn by: float32[2, rows, length] in [0, 1), the same however the rows are
    dealt with, and on whatever device; of all, or of the rows of these numbers.

    Devices round logits differently: a label is another one there only where the running sum of probabilities passes
    its number within that.
    """
    drawn = torch.rand(rows, length, 2, generator=torch.Generator().manual_seed(seed))
    if numbers is not None:
        drawn = drawn[list(numbers)]
    return drawn.movedim(2, 0)


def gradient_at_head(x: Tensor, ln_f: nn.LayerNorm, table: Tensor, uniforms: Tensor) -> Tensor:
    """Of the sum over positions of (z(b) - z(a)) / 2**0.5, for the logits z of two labels that are drawn, by the hidden
    states x[B, T, C] behind the last block: [B, T, C].

    Its covariance is that of -log p(label): of the labels' rows of the head, under p. That one's mean row takes another
    product with all of the head.

    Args:
        x: see above.
        ln_f: the final norm.
        table: the head's weight, [V, C].
        uniforms: [2, B, T] in [0, 1): a label is where the predicted probabilities, added up by number, pass it.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        h = ln_f(x)
    flat, drawn = h.detach().flatten(0, 1), uniforms.flatten(1).T
    gradient = torch.empty_like(flat)
    rows = min(len(flat), POSITIONS)
    logits, total = (flat.new_empty(rows, len(table)) for _ in range(2))
    for start in range(0, len(flat), POSITIONS):
        some = slice(start, start + POSITIONS)
        count = len(flat[some])
        z = _logits(flat[some], table, logits[:count])
        a, b = draw_labels(z, drawn[some], total[:count]).T
        gradient[some] = (table[b] - table[a]) * 0.5**0.5
    found: Tensor = torch.autograd.grad(h, x, gradient.view_as(h))[0]
    return found


def _logits(x: Tensor, table: Tensor, out: Tensor) -> Tensor:
    """x[N, C] table[V, C]ᵀ, in `out`: on a CPU some columns at a time, since MKL takes half as long again for all of
    50,257 together."""
    columns = COLUMNS if x.device.type == "cpu" else len(table)
    for start in range(0, len(table), columns):
        out[:, start : start + columns] = x @ table[start : start + columns].T
    return out


def draw_labels(logits: Tensor, uniforms: Tensor, out: Tensor | None = None) -> Tensor:
    """int64[N, S]: for each row of logits[N, V], which are overwritten, where the running sum of probabilities passes
    uniforms[N, S]. `out`[N, V] holds that sum."""
    total = torch.cumsum(logits.sub_(logits.amax(1, keepdim=True)).exp_(), 1, out=out)
    place = (uniforms.to(logits.dtype) * total[:, -1:]).contiguous()  # torch warns of others
    return torch.searchsorted(total, place, right=True).clamp_(max=logits.shape[1] - 1)


def gradients_in_block(
    block: Block,
    x: Tensor,
    gradient: Tensor,
    masks: AttentionMasks,
    names: tuple[str, ...],
    middle: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradients at the block's input x[B, T, C], and at the outputs [B, T, O] of its layers `names`.

    `gradient`[B, T, C] is that at the block's output, and so at that of c_proj, which is never computed; nor is what
    c_proj sees. `middle`[B, T, C] are the hidden states behind attention, where they are known.
    """
    attention, mlp = block.attn.attention, block.mlp
    outputs: dict[str, Tensor] = {}
    with torch.enable_grad(), recording(block, tuple(name for name in names if name in BEFORE_ATTENTION), outputs):
        x = x.detach().requires_grad_()
        context = attention.context(block.ln_1(x), masks, None)
    if middle is None:
        middle = x.detach() + attention.out_proj(context.detach())
    with torch.enable_grad():
        middle = middle.detach().requires_grad_()
        raised = mlp.c_fc(block.ln_2(middle))
    at_raised = _through_activation(mlp, raised.detach(), gradient @ mlp.c_proj.weight)
    at_middle = torch.autograd.grad(raised, middle, at_raised)[0].add_(gradient)
    given = at_middle @ attention.out_proj.weight
    at_input, *at_outputs = torch.autograd.grad(context, [x, *outputs.values()], given)
    found = dict(zip(outputs, at_outputs, strict=True))
    found |= {OUT_PROJ: at_middle, C_FC: at_raised, C_PROJ: gradient}
    return at_input.add_(at_middle), {name: found[name] for name in names}


def _through_activation(mlp: MLP, x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient at what the activation sees, x, of that at what it gives."""
    if mlp.activation in GELU_BY_TANH:  # without what it gives, which takes half of the time
        found: Tensor = torch.ops.aten.gelu_backward(gradient, x, approximate="tanh")
        return found
    with torch.enable_grad():
        x = x.requires_grad_()
        return torch.autograd.grad(mlp.act(x), x, gradient)[0]


@contextmanager
def recording(block: Block, names: tuple[str, ...], outputs: dict[str, Tensor]) -> Iterator[None]:
    """Have `outputs` hold what the layers `names` of a block give."""

    def keep(name: str) -> Callable[..., None]:
        return lambda layer, given, output: outputs.update({name: output})

    handles = [block.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
