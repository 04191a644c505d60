"""What will happen to every tensor of a checkpoint, decided from its headers: no weight is read here.

A plan is the whole decision. `neoquant plan` prints it, `quantization.quantize` carries it out row by row, and a
request that cannot be carried out is refused here, with every reason at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neoquant.calibration.memory import CUDA_LIBRARIES, CalibrationMemory
from neoquant.checkpoint import SHARD_SIZE, Checkpoint, TensorHeader, expected_size
from neoquant.errors import RecipeError, locate
from neoquant.formats import NAMED, Format, first_that_holds
from neoquant.formats.base import dtype_name
from neoquant.grids import Grid, make_grid
from neoquant.model.config import GPTNeoConfig
from neoquant.model.names import EMBEDDING, TABLES, TIED_HEAD, canonical_layer, left_out
from neoquant.model.shapes import head_shapes, network_shapes
from neoquant.quantization.plan_checks import FLOATS, refuse_quantized, require_free_names, require_network
from neoquant.quantization.plan_notes import dropped_notes, format_notes, grid_notes, layer_notes
from neoquant.quantization.plan_rows import Action, PlanRow, RowMaker, Target, is_linear_weight, matrix_shape
from neoquant.quantization.recipe import Recipe, Rule

__all__ = [
    "DEFAULT_EMBEDDINGS",
    "EMBEDDING_GRIDS",
    "FLOATS",
    "IN_FLIGHT_BYTES",
    "Action",
    "Plan",
    "PlanRow",
    "Target",
    "is_linear_weight",
    "make_plan",
]

EMBEDDING_GRIDS: Mapping[str, Grid] = {"int8": make_grid(8, "int8"), "nf4": make_grid(4, "nf4")}
"""What `embeddings` in a recipe may ask for."""

DEFAULT_EMBEDDINGS = "int8"
"""What `embeddings = "auto"` is in a format that holds it: on the bundled model int8 adds a six-hundredth of what NF4
linears lose, and nf4 a quarter (recipes/README.md)."""

# Of a process that has imported torch and bitsandbytes and dealt with tiny tensors, measured on Linux.
_RESIDENT_BYTES = 400_000_000 + CUDA_LIBRARIES

IN_FLIGHT_BYTES = 1 << 26
"""Bytes of the source that may wait to be hashed and written while a tensor is quantized, beside the one before it."""


@dataclass(frozen=True)
class Plan:
    """Every decision about one checkpoint and one recipe, and the sizes that follow."""

    source: str
    revision: str | None
    recipe: Recipe
    rows: tuple[PlanRow, ...]
    format: Format
    dtype: torch.dtype
    config: Mapping[str, Any]
    """`config.json` of the output."""
    shard_size: int
    notes: tuple[str, ...]
    other_bytes: int = 0
    """Bytes of the output's files that hold no weights."""
    calibrating: CalibrationMemory | None = None
    """What a run that sees text takes, if this is one and it was asked."""

    @property
    def source_name(self) -> str:
        """The hub id, or the folder's name without where it lies on this machine."""
        return self.source if self.revision is not None else Path(self.source).resolve().name

    @property
    def stored(self) -> list[TensorHeader]:
        """Every tensor of the output, in order."""
        return [header for row in self.rows for header in row.stored]

    @property
    def source_bytes(self) -> int:
        return sum(row.source.nbytes for row in self.rows)

    @property
    def weights_bytes(self) -> int:
        """Bytes of the output's weight files and their index."""
        return expected_size(self.stored, self.shard_size)

    @property
    def output_bytes(self) -> int:
        """Bytes of the whole output folder."""
        return self.weights_bytes + self.other_bytes

    @property
    def peak_memory_bytes(self) -> int:
        """Resident bytes of the process at its worst: few tensors live at once, or one block where text is seen."""
        pairs = zip((0, *(row.source.nbytes for row in self.rows)), self.rows, strict=False)
        streaming = max((size + row.work_bytes for size, row in pairs), default=0)
        calibrating = 0 if self.calibrating is None else self.calibrating.memory
        return max(_RESIDENT_BYTES + IN_FLIGHT_BYTES + streaming, calibrating)

    @property
    def bits_per_weight_linears(self) -> float:
        """Bits stored for each weight of the block linears, those kept in half precision included."""
        return _bits_per_weight(row for row in self.rows if row.is_linear)

    @property
    def bits_per_weight_model(self) -> float:
        """Bits stored for each parameter of the model, a tied embedding counted once."""
        return _bits_per_weight(row for row in self.rows if row.action != "drop")

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, for `neoquant.json` and `--json`."""
        return {
            "source": self.source_name,
            "revision": self.revision,
            "recipe": self.recipe.model_dump(mode="json", exclude_unset=True),
            "format": self.format.name,
            "dtype": dtype_name(self.dtype),
            "bits_per_weight_linears": round(self.bits_per_weight_linears, 4),
            "bits_per_weight_model": round(self.bits_per_weight_model, 4),
            "source_bytes": self.source_bytes,
            "weights_bytes": self.weights_bytes,
            "notes": list(self.notes),
            "tensors": [row.to_dict() for row in self.rows],
        }


@dataclass(frozen=True)
class _Treatment:
    """What a recipe does with the layers of a checkpoint.

    linears  block linears by their canonical names
    tables   what the recipe's `embeddings` decides about: the token embedding, and the head where it is another tensor
    rules    linear -> the rule that decides about it, None where there is none
    grids    linear to quantize -> its grid
    ordered  linears that will have an activation order
    """

    linears: Mapping[str, TensorHeader]
    tables: Mapping[str, TensorHeader]
    rules: Mapping[str, Rule | None]
    grids: Mapping[str, Grid]
    ordered: Collection[str]

    @property
    def targets(self) -> dict[str, tuple[Grid, tuple[int, int]]]:
        """Linear to quantize -> its grid and shape."""
        return {layer: (grid, matrix_shape(self.linears[layer])) for layer, grid in self.grids.items()}


def make_plan(checkpoint: Checkpoint, recipe: Recipe, *, shard_size: int = SHARD_SIZE) -> Plan:
    """Decide about every tensor of `checkpoint`.

    Raises:
        ConfigError: `config.json` is not a legal GPT-Neo's.
        CheckpointError: a tensor that `config.json` promises is missing or has another shape.
        RequestError: the checkpoint is quantized already, or the recipe cannot be carried out; every reason is named.
    """
    headers = list(checkpoint.headers.values())
    refuse_quantized(checkpoint)
    with locate(f"{checkpoint.source}/config.json"):
        config = GPTNeoConfig.from_dict(checkpoint.config)
    with locate(checkpoint.source):
        require_network(headers, config)
    treatment = _treat(headers, recipe)
    format, passed_over = _require_possible(recipe, headers, treatment)
    dtype = _half_dtype(headers, recipe.dtype)
    grids = {**treatment.grids, **_table_grids(recipe, format, treatment.tables)}
    with locate(checkpoint.source):
        require_free_names(checkpoint.headers, grids, format)
    maker = RowMaker(treatment.rules, grids, format, dtype, network_shapes(config) | head_shapes(config))
    tied_head = TIED_HEAD if config.tie_word_embeddings else None
    rows = tuple(maker.tied_head(header) if header.name == tied_head else maker.row(header) for header in headers)
    notes = (
        *checkpoint.notes,
        *layer_notes(rows, treatment.rules),
        *grid_notes(treatment.targets),
        *format_notes(format, treatment.targets, passed_over),
        *dropped_notes(any(row.action == "drop" for row in rows), checkpoint.dropped),
    )
    return Plan(
        source=checkpoint.source,
        revision=checkpoint.revision,
        recipe=recipe,
        rows=rows,
        format=format,
        dtype=dtype,
        config=_output_config(checkpoint.config, format, grids, treatment, dtype),
        shard_size=shard_size,
        notes=notes,
    )


def _treat(headers: Iterable[TensorHeader], recipe: Recipe) -> _Treatment:
    """What the recipe's rules say of each layer."""
    weights = {canonical_layer(header.name): header for header in headers if header.name.endswith(".weight")}
    linears = {layer: header for layer, header in weights.items() if is_linear_weight(header)}
    rules = {layer: recipe.rule_for(layer) for layer in linears}
    treated = {layer: rule for layer, rule in rules.items() if rule is not None and not rule.keep}
    tables = {layer: weights[layer] for layer in TABLES if layer in weights and weights[layer].dtype in FLOATS}
    of_tables = {layer: recipe.rule_for(layer) for layer in tables}
    return _Treatment(
        linears=linears,
        tables={layer: tables[layer] for layer, rule in of_tables.items() if rule is None or not rule.keep},
        rules=rules,
        grids={layer: rule.grid() for layer, rule in treated.items()},
        ordered=[layer for layer, rule in treated.items() if rule.make_quantizer().stores_order],
    )


def _require_possible(
    recipe: Recipe, headers: Iterable[TensorHeader], treatment: _Treatment
) -> tuple[Format, list[str]]:
    """The format to write, and why those before it in the table are not taken. Raises RecipeError with all faults."""
    others = [canonical_layer(header.name) for header in headers if not is_linear_weight(header)]
    faults = recipe.complaints(treatment.linears, others)
    if not treatment.grids:
        faults.append("nothing is left to quantize: every layer is kept in half precision")
    if recipe.embeddings in EMBEDDING_GRIDS and not treatment.tables:
        faults.append(f'embeddings = "{recipe.embeddings}" finds none: a rule keeps it, or there is no {EMBEDDING}')
    format, passed_over = first_that_holds(
        NAMED[recipe.format],
        treatment.targets,
        embeddings=recipe.embeddings in EMBEDDING_GRIDS,
        ordered=treatment.ordered,
    )
    if format is None:
        faults.append(f'format = "{recipe.format}" cannot hold this: {"; ".join(dict.fromkeys(passed_over))}')
    if faults or format is None:
        raise RecipeError("; ".join(faults))
    return format, passed_over


def _table_grids(recipe: Recipe, format: Format, tables: Iterable[str]) -> dict[str, Grid]:
    """Token embedding and head -> grid, where the recipe, or the format's default, quantizes them."""
    choice: str = recipe.embeddings
    if choice == "auto":
        choice = DEFAULT_EMBEDDINGS if format.holds_embeddings else "keep"
    return {} if choice == "keep" else dict.fromkeys(tables, EMBEDDING_GRIDS[choice])


def _half_dtype(headers: Iterable[TensorHeader], choice: str) -> torch.dtype:
    """The half-precision type of what is not quantized: as asked, or the source's; float32 becomes float16."""
    if choice != "auto":
        chosen: torch.dtype = getattr(torch, choice)
        return chosen
    weights: dict[torch.dtype, int] = {}
    for header in headers:
        weights[header.dtype] = weights.get(header.dtype, 0) + header.numel
    commonest = max(weights, key=lambda dtype: weights[dtype], default=torch.float16)
    return torch.bfloat16 if commonest == torch.bfloat16 else torch.float16


def _output_config(
    config: Mapping[str, Any],
    format: Format,
    grids: Mapping[str, Grid],
    treatment: _Treatment,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The source's configuration with the quantization and the stored type in it."""
    skipped = left_out(layer for layer in treatment.linears if layer not in grids)
    output = {**config, "dtype": dtype_name(dtype)}
    if "torch_dtype" in config:
        output["torch_dtype"] = dtype_name(dtype)
    output["quantization_config"] = format.config(grids, skipped, bool(treatment.ordered))
    return output


def _bits_per_weight(rows: Iterable[PlanRow]) -> float:
    weights = stored = 0
    for row in rows:
        weights += row.source.numel
        stored += row.out_bytes
    return 8 * stored / weights if weights else 0.0
