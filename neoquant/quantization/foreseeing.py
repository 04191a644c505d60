"""What each layer would take and add on each of several grids, before anything is chosen.

To second order a layer adds 1/4 tr(K E H Eᵀ), with the error E that GPTQ leaves, the Hessian H of the layer's inputs
and K of its outputs (see `calibration.loss_hessian`): half a Kronecker-factored Hessian of the KL divergence from the
unquantized model. That tells layers apart, but foresees too little: GPTQ fits the samples that it is shown, and errors
of several layers add up to more than each alone. So a few samples are not shown, and pass through the model on each
grid: what it then loses as a whole is shared out among its layers by what each was foreseen to add. What quantized
embeddings lose is measured by the same samples.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from neoquant.calibration.block_forward import BlockForward
from neoquant.calibration.dataset import Calibration
from neoquant.calibration.memory import estimate_memory, gradient_rows
from neoquant.checkpoint import Checkpoint
from neoquant.errors import locate
from neoquant.grids import Affine, Grid, TrellisGrid
from neoquant.model.config import GPTNeoConfig
from neoquant.model.names import TABLES
from neoquant.native import trellis
from neoquant.progress import SILENT, Progress
from neoquant.quantization.allocation import Candidates
from neoquant.quantization.plan import EMBEDDING_GRIDS, Plan, make_plan
from neoquant.quantization.recipe import Recipe
from neoquant.quantization.resume import ResumableRun
from neoquant.quantization.reverse import look_at_unquantized, methods_of, shrunk_hessians
from neoquant.quantization.sequential import embed, read_block, require_calibration
from neoquant.quantization.trial import Trial
from neoquant.quantizers import Gptq, Hessian
from neoquant.tensor import QuantizedTensor

GRIDS: tuple[Grid, ...] = (Affine(3, 64), Affine(4, 128), Affine(4, 64), Affine(4, 32), Affine(8, 128))
"""What layers may go on, beside trellises, or the grid in their place: no grid has bits between four and eight, but
smaller and larger groups do."""
TRELLISES: tuple[Grid, ...] = (TrellisGrid(64, 2), TrellisGrid(64, 3))
SMALLEST: Grid = Affine(2, 32)
"""Trellises lose less in fewer bits, but without the native library their search takes hours."""

KEEP = "keep"
HELD_OUT = 8  # one sample of so many is not shown, and
HELD_TOKENS = 4096  # so many tokens at most


def candidate_grids() -> tuple[Grid, ...]:
    """What layers may go on, here."""
    return (*(TRELLISES if trellis.refuse() is None else (SMALLEST,)), *GRIDS)


def foresee(
    checkpoint: Checkpoint,
    calibration: Calibration,
    grids: Sequence[Grid] | None = None,
    *,
    embeddings: bool = False,
    max_memory: int | None = None,
    progress: Progress = SILENT,
) -> Candidates:
    """What each layer would take and add on each grid, by rounding it there on the unquantized model's inputs, scaled
    to what the model as a whole loses there; with `embeddings`, those too.

    Raises RequestError where the checkpoint or the calibration does not serve.
    """
    grids = candidate_grids() if grids is None else tuple(grids)
    plans = [make_plan(checkpoint, _uniform(grid)) for grid in grids]
    require_calibration(plans[0], calibration)
    tables = tuple(EMBEDDING_GRIDS) if embeddings else ()
    with torch.no_grad():
        found = _Foreseeing(checkpoint, plans[0], calibration, grids, tables, max_memory).losses(progress)
    layers = [row.layer for row in plans[0].rows if row.is_linear]
    sizes = [{row.layer: row.out_bytes for row in plan.rows if row.is_linear} for plan in plans]
    linears = Candidates(
        tuple(layers),
        tuple(grids),
        torch.tensor([[by_layer[layer] for by_layer in sizes] for layer in layers]),
        torch.stack([found.layers[layer] for layer in layers]),
        sum(row.source.numel for row in plans[0].rows if row.is_linear),
    )
    if not embeddings:
        return linears
    return linears.with_tables(_table_sizes(checkpoint, grids[0], (*tables, KEEP)), {**found.tables, KEEP: 0.0})


def _table_sizes(checkpoint: Checkpoint, grid: Grid, choices: Sequence[str]) -> dict[str, int]:
    plans = {name: make_plan(checkpoint, _uniform(grid, name)) for name in choices}
    return {name: sum(row.out_bytes for row in plan.rows if row.layer in TABLES) for name, plan in plans.items()}


def _uniform(grid: Grid, embeddings: str = KEEP) -> Recipe:
    described = {"bits": grid.bits, **grid.describe()}
    rule = {"match": "*", "type": described.pop("name"), **described, "quantizer": Gptq.name, "objective": "model"}
    rules = [{**rule, "correction": 0.0}]
    return Recipe.parse({"name": "uniform", "format": "neoquant", "embeddings": embeddings, "rules": rules})


@dataclass
class _Found:
    """layers  linear -> nats a token that it adds on each grid, float64[G]
    tables  the same of embeddings, by what a recipe calls it
    """

    layers: dict[str, Tensor] = field(default_factory=dict)
    tables: dict[str, float] = field(default_factory=dict)

    def scale(self, wholes: Sequence[float]) -> None:
        """Have what the layers add on each grid sum up to `wholes`."""
        sums = torch.stack(list(self.layers.values())).sum(0)
        scales = torch.tensor(wholes, dtype=torch.float64) / sums.clamp(min=torch.finfo(torch.float64).tiny)
        self.layers = {layer: losses * scales for layer, losses in self.layers.items()}


class _Foreseeing:
    """Through the unquantized model, block by block, each layer rounded on every grid."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        calibration: Calibration,
        grids: Sequence[Grid],
        tables: Sequence[str],
        max_memory: int | None,
    ) -> None:
        self.checkpoint, self.plan, self.grids = checkpoint, plan, grids
        self.config = GPTNeoConfig.from_dict(checkpoint.config)
        self.shown, held = hold_out(calibration)
        rows, length = self.shown.ids.shape
        self.memory = estimate_memory(self.config, rows, length, max_memory, methods_of(plan))
        self.trial = Trial(checkpoint, self.config, held, len(grids), tables)

    def losses(self, progress: Progress) -> _Found:
        ids, config, found = self.shown.ids, self.config, _Found()
        with tempfile.TemporaryDirectory(prefix="neoquant-") as folder, ResumableRun(Path(folder) / "model") as run:
            run.begin({}, config.num_layers)
            look_at_unquantized(self.checkpoint, self.plan, self.shown, self.memory, run, progress)
            with progress.task("foreseeing", total=config.num_layers) as advance:
                hidden = run.new_hidden_states((*ids.shape, config.hidden_size), self.memory.spilled)
                embed(self.checkpoint, ids, hidden)
                forward = BlockForward(hidden, config.window_size, self.memory.keeps_inner)
                for number in range(config.num_layers):
                    hessians = shrunk_hessians(run.output_hessians(number), gradient_rows(*ids.shape))
                    found.layers |= self._block(number, forward, hessians)
                    advance(1)
                hidden.close()
            run.remove()
        wholes, found.tables = self.trial.losses()
        found.scale(wholes)
        return found

    def _block(self, number: int, forward: BlockForward, output_hessians: dict[str, Tensor]) -> dict[str, Tensor]:
        """To second order, what each layer of a block adds on each grid."""
        rows = {row.name_in_block.removesuffix(".weight"): row for row in self.plan.rows if row.block == number}
        block = read_block(self.checkpoint, list(rows.values()), self.config, number)
        losses: dict[str, Tensor] = {}
        made: dict[str, list[QuantizedTensor]] = {}
        for stage in forward.stages(block):
            hessian = Hessian(stage.in_features)
            for batch in stage.inputs():
                hessian.add(batch)
            for name, linear in stage.linears.items():
                with locate(rows[name].name):
                    made[name] = [
                        Gptq(objective="model", correction=0.0).quantize(
                            linear.weight.detach(), grid, hessian, output_hessians[name]
                        )
                        for grid in self.grids
                    ]
                added = [_loss(linear.weight.detach(), q, hessian, output_hessians[name]) for q in made[name]]
                losses[rows[name].layer] = torch.tensor(added, dtype=torch.float64)
        self.trial.through(block, made)
        return losses


def hold_out(calibration: Calibration) -> tuple[Calibration, Tensor]:
    """The samples that are shown, and ids[R, T] of the last ones, which are not, unless there is but one."""
    rows, length = calibration.ids.shape
    held = max(1, min(rows // HELD_OUT, HELD_TOKENS // length))
    shown = calibration.ids if rows == 1 else calibration.ids[:-held]
    return replace(calibration, ids=shown), calibration.ids[-held:]


def _loss(weight: Tensor, q: QuantizedTensor, hessian: Hessian, output_hessian: Tensor) -> float:
    """Nats a token that weight[O, I] is foreseen to add as q, to second order."""
    error = q.dequantize(torch.float32) - weight
    of_heads = error.view(len(output_hessian), -1, error.shape[1])
    return float(((output_hessian @ of_heads).view_as(error) * (error @ hessian.matrix)).sum()) / 4
