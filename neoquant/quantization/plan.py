"""What will happen to every tensor of a checkpoint, decided from its headers: no weight is read here.

A plan is the whole decision. `neoquant plan` prints it, `quantization.quantize` carries it out row by row, and a
request that cannot be carried out is refused here, with every reason at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from neoquant.calibration.memory import CalibrationMemory
from neoquant.checkpoint import SHARD_SIZE, Checkpoint, TensorHeader, expected_size
from neoquant.errors import CheckpointError, FormatError, RecipeError, RequestError
from neoquant.formats import FORMATS, Format, detect, why_not
from neoquant.formats.base import dtype_name
from neoquant.grids import Grid, make_grid
from neoquant.model.config import GPTNeoConfig
from neoquant.model.names import (
    BLOCK_LINEARS,
    EMBEDDING,
    HEADS,
    TABLES,
    TIED_HEAD,
    canonical_layer,
    in_block,
    is_block_linear,
)
from neoquant.quantization.recipe import Recipe, Rule
from neoquant.quantizers import Nearest, Quantizer

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""What a weight that is to be quantized may be stored as."""

EMBEDDING_GRIDS: Mapping[str, Grid] = {"int8": make_grid(8, "int8"), "nf4": make_grid(4, "nf4")}
"""What `embeddings` in a recipe may ask for."""

DEFAULT_EMBEDDINGS = "int8"
"""What `embeddings = "auto"` is in a format that holds it: on the bundled model int8 adds a six-hundredth of what NF4
linears lose, and nf4 a quarter (recipes/README.md)."""

_UNKNOWN = "not a block linear"

# Of a process that has imported torch and bitsandbytes and dealt with tiny tensors, measured on Linux with torch for
# the CPU; and what packing takes beside a weight that is being quantized: its codes, and two more of their size.
_RESIDENT_BYTES = 400_000_000
_WORK_BYTES_PER_WEIGHT = 3

IN_FLIGHT_BYTES = 1 << 26
"""Bytes of the source that may wait to be hashed and written while a tensor is quantized, beside the one before it."""

_Targets = Mapping[str, tuple[Grid, tuple[int, int]]]  # layer to quantize -> its grid and shape

Action = Literal["quantize", "keep", "copy", "drop"]


@dataclass(frozen=True)
class Target:
    """Where a weight goes and who takes it there."""

    grid: Grid
    quantizer: Quantizer


@dataclass(frozen=True)
class PlanRow:
    """One tensor of the source.

    `action`: `quantize`; `keep`, a weight matrix in half precision; `copy`, a small tensor (bias, norm) in half
    precision; `drop`, not written. `stored` holds what the output has in its place, `reason` why in a few words.
    """

    source: TensorHeader
    layer: str
    action: Action
    stored: tuple[TensorHeader, ...]
    reason: str
    target: Target | None = None
    """Of what is quantized."""
    stored_name: str | None = None
    """The tensor's name in the output, where that is another."""

    @property
    def grid(self) -> Grid | None:
        return None if self.target is None else self.target.grid

    @property
    def quantizer(self) -> Quantizer | None:
        return None if self.target is None else self.target.quantizer

    @property
    def needs_calibration(self) -> bool:
        return self.target is not None and self.target.quantizer.needs_calibration

    @property
    def block(self) -> int | None:
        """The number of the block that the tensor belongs to."""
        place = in_block(self.name)
        return None if place is None else place[0]

    @property
    def name_in_block(self) -> str:
        """`attn.attention.q_proj.weight`, of a tensor that belongs to a block."""
        place = in_block(self.name)
        assert place is not None
        return place[1]

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def is_linear(self) -> bool:
        """Whether this is the weight of a block linear, quantized or not."""
        return is_linear_weight(self.source)

    @property
    def out_bytes(self) -> int:
        return sum(header.nbytes for header in self.stored)


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
        streaming = max((size + _work_bytes(row) for size, row in pairs), default=0)
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
            "tensors": [_row_dict(row) for row in self.rows],
        }


def make_plan(checkpoint: Checkpoint, recipe: Recipe, *, shard_size: int = SHARD_SIZE) -> Plan:
    """Decide about every tensor of `checkpoint`.

    Raises:
        ConfigError: `config.json` is not a legal GPT-Neo's.
        CheckpointError: a layer that `config.json` promises is missing or has another shape.
        RequestError: the checkpoint is quantized already, or the recipe cannot be carried out; every reason is named.
    """
    headers = list(checkpoint.headers.values())
    _refuse_quantized(checkpoint)
    _check_blocks(headers, GPTNeoConfig.from_dict(checkpoint.config))
    linears = {canonical_layer(header.name): header for header in headers if is_linear_weight(header)}
    others = [canonical_layer(header.name) for header in headers if not is_linear_weight(header)]
    tied = checkpoint.config.get("tie_word_embeddings", True)
    tables = _tables(headers, recipe, tied)
    faults = recipe.complaints(linears, others)
    rules = {layer: recipe.rule_for(layer) for layer in linears}
    treated = {layer: rule for layer, rule in rules.items() if rule is not None and not rule.keep}
    grids = {layer: rule.grid() for layer, rule in treated.items()}
    ordered = [layer for layer, rule in treated.items() if rule.make_quantizer().stores_order]
    if not grids:
        faults.append("nothing is left to quantize: every layer is kept in half precision")
    targets = {layer: (grid, _matrix(linears[layer])) for layer, grid in grids.items()}
    if recipe.embeddings in EMBEDDING_GRIDS and not tables:
        faults.append(f'embeddings = "{recipe.embeddings}" finds none: a rule keeps it, or there is no {EMBEDDING}')
    format, passed_over = _choose_format(recipe, targets, ordered)
    if format is None:
        faults.append(f'format = "{recipe.format}" cannot hold this: {"; ".join(dict.fromkeys(passed_over))}')
    if faults or format is None:
        raise RecipeError("; ".join(faults))

    dtype = _half_dtype(headers, recipe.dtype)
    choice = _embeddings(recipe.embeddings, format)
    if choice != "keep":
        grids |= dict.fromkeys(tables, EMBEDDING_GRIDS[choice])
    rows = tuple(
        _tied_head_row(header, EMBEDDING in checkpoint.headers, grids, format, dtype)
        if tied and header.name == TIED_HEAD
        else _row(header, rules, grids, format, dtype)
        for header in headers
    )
    return Plan(
        source=checkpoint.source,
        revision=checkpoint.revision,
        recipe=recipe,
        rows=rows,
        format=format,
        dtype=dtype,
        config=_output_config(checkpoint.config, format, grids, linears, dtype, bool(ordered)),
        shard_size=shard_size,
        notes=(
            *_layer_notes(rows, rules),
            *_grid_notes(targets),
            *_format_notes(format, targets, passed_over),
            *_dropped_notes(rows, checkpoint.dropped),
        ),
    )


def is_linear_weight(header: TensorHeader) -> bool:
    """Whether a tensor is the weight matrix of a block linear."""
    is_weight = header.name.endswith(".weight") and len(header.shape) == 2
    return is_weight and is_block_linear(canonical_layer(header.name))


def _matrix(header: TensorHeader) -> tuple[int, int]:
    rows, columns = header.shape
    return rows, columns


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    try:
        found = detect(checkpoint.config, checkpoint.headers)
    except FormatError as error:
        how, as_it_is = str(error), ""
    else:
        if found is None:
            return
        how = f"format {found.name}"
        as_it_is = "; to use this one as it is, neoquant generate, eval and compare take it"
    raise RequestError(
        f"{checkpoint.source} is already quantized ({how}), and quantizing twice loses twice: "
        f"give the model it was made from, in full or half precision{as_it_is}"
    )


def _check_blocks(headers: Sequence[TensorHeader], config: GPTNeoConfig) -> None:
    """Every block linear that the configuration promises is there, in its shape and a floating type; no others are."""
    hidden, inner = config.hidden_size, config.inner_size
    shapes = {"mlp.c_fc": (inner, hidden), "mlp.c_proj": (hidden, inner)}
    promised = {
        f"transformer.h.{block}.{linear}": shapes.get(linear, (hidden, hidden))
        for block in range(config.num_layers)
        for linear in BLOCK_LINEARS
    }
    found = {canonical_layer(header.name): header for header in headers if is_linear_weight(header)}
    sizes = f"config.json says num_layers = {config.num_layers}, hidden_size = {hidden}, intermediate_size = {inner}"
    for what, names in (("missing", promised.keys() - found.keys()), ("unexpected", found.keys() - promised.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{min(names)}.weight{more} {what}: {sizes}")
    for layer, shape in promised.items():
        if found[layer].shape != shape:
            raise CheckpointError(f"{layer}.weight has shape {list(found[layer].shape)}, not {list(shape)}: {sizes}")
        if found[layer].dtype not in FLOATS:
            legal = ", ".join(map(dtype_name, FLOATS))
            raise CheckpointError(f"{layer}.weight is {dtype_name(found[layer].dtype)}, expected one of {legal}")


def _tables(headers: Iterable[TensorHeader], recipe: Recipe, tied: bool) -> dict[str, TensorHeader]:
    """What the recipe's `embeddings` decides about: the token embedding, and the head where it is another tensor."""
    found = {canonical_layer(header.name): header for header in headers if header.name.endswith(".weight")}
    found = {layer: found[layer] for layer in TABLES if layer in found}
    if tied and "lm_head" in found:  # the same tensor, whichever of the two names it has
        found.setdefault("transformer.wte", found.pop("lm_head"))
    rules = {layer: recipe.rule_for(layer) for layer in found}
    kept = {layer for layer, rule in rules.items() if rule is not None and rule.keep}
    return {layer: header for layer, header in found.items() if layer not in kept and header.dtype in FLOATS}


def _embeddings(choice: str, format: Format) -> str:
    """What becomes of the token embedding: a key of `EMBEDDING_GRIDS`, or "keep"."""
    if choice != "auto":
        return choice
    return DEFAULT_EMBEDDINGS if format.holds_embeddings else "keep"


def _choose_format(recipe: Recipe, targets: _Targets, ordered: Collection[str]) -> tuple[Format | None, list[str]]:
    """The first format of the choice that holds all targets in one checkpoint, and why those before it do not."""
    reasons: list[str] = []
    for format in FORMATS.values():
        if recipe.format in ("auto", format.family):
            reason = why_not(format, targets, ordered)
            if reason is None and recipe.embeddings in EMBEDDING_GRIDS and not format.holds_embeddings:
                reason = f'format {format.name} keeps embeddings in half precision, format = "neoquant" can hold them'
            if reason is None:
                return format, reasons
            reasons.append(reason)
    return None, reasons


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


def _tied_head_row(
    header: TensorHeader, has_embedding: bool, grids: Mapping[str, Grid], format: Format, dtype: torch.dtype
) -> PlanRow:
    """A tied head is stored once, under the embedding's name, whichever of the two names the source has."""
    if has_embedding:
        return PlanRow(header, "lm_head", "drop", (), f"tied to {EMBEDDING}")
    grid = grids.get("transformer.wte")
    if grid is not None:
        row = _quantized_row(header._replace(name=EMBEDDING), "lm_head", grid, None, format)
        return replace(row, source=header, stored_name=EMBEDDING)
    return PlanRow(header, "lm_head", "keep", (TensorHeader(EMBEDDING, dtype, header.shape),), "tied embedding")


def _row(
    header: TensorHeader,
    rules: Mapping[str, Rule | None],
    grids: Mapping[str, Grid],
    format: Format,
    dtype: torch.dtype,
) -> PlanRow:
    layer = canonical_layer(header.name)
    grid = grids.get(layer) if header.name.endswith(".weight") else None
    if grid is not None:
        return _quantized_row(header, layer, grid, rules.get(layer), format)
    kept = TensorHeader(header.name, dtype if header.dtype.is_floating_point else header.dtype, header.shape)
    action: Action = "keep" if len(header.shape) > 1 else "copy"
    return PlanRow(header, layer, action, (kept,), _why_kept(header, layer, rules))


def _quantized_row(header: TensorHeader, layer: str, grid: Grid, rule: Rule | None, format: Format) -> PlanRow:
    """A block linear by its `rule`, or an embedding without one."""
    prefix = header.name.removesuffix(".weight")
    quantizer = Nearest() if rule is None else rule.make_quantizer()
    layout = format.layout(grid, _matrix(header), header.dtype, quantizer.stores_order)
    stored = tuple(TensorHeader(prefix + suffix, *spec) for suffix, spec in layout.items())
    why = "embedding" if rule is None else f"match = {rule.match!r}"
    return PlanRow(header, layer, "quantize", stored, why, Target(grid, quantizer))


def _why_kept(header: TensorHeader, layer: str, rules: Mapping[str, Rule | None]) -> str:
    if is_linear_weight(header):
        rule = rules[layer]
        return f"match = {rule.match!r}" if rule is not None else "no rule matches it"
    if len(header.shape) < 2:
        return "small"
    return "head" if layer in HEADS else "embedding" if layer.endswith(("wte", "wpe")) else _UNKNOWN


def _output_config(
    config: Mapping[str, Any],
    format: Format,
    grids: Mapping[str, Grid],
    linears: Iterable[str],
    dtype: torch.dtype,
    ordered: bool,
) -> dict[str, Any]:
    """The source's configuration with the quantization and the stored type in it."""
    # Without the prefix, a name fits every model class: readers compare the end of a layer's name with these.
    skipped = [layer.removeprefix("transformer.") for layer in linears if layer not in grids] + list(HEADS)
    output = {**config, "dtype": dtype_name(dtype)}
    if "torch_dtype" in config:
        output["torch_dtype"] = dtype_name(dtype)
    output["quantization_config"] = format.config(grids, skipped, ordered)
    return output


def _layer_notes(rows: Sequence[PlanRow], rules: Mapping[str, Rule | None]) -> Iterator[str]:
    unmatched = [layer for layer, rule in rules.items() if rule is None]
    if unmatched:
        yield f"{len(unmatched)} linears stay in half precision because no rule matches them: {_some(unmatched)}"
    unknown = [row.name for row in rows if row.reason == _UNKNOWN]
    if unknown:
        yield f"{len(unknown)} tensors are no part of a GPT-Neo that neoquant knows; kept: {_some(unknown)}"


def _grid_notes(targets: _Targets) -> Iterator[str]:
    yield from dict.fromkeys(remark for grid, shape in targets.values() if (remark := grid.remark(shape)))


def _format_notes(format: Format, targets: _Targets, passed_over: Sequence[str]) -> Iterator[str]:
    if format.family == "neoquant" and passed_over:
        yield f"only neoquant reads the result, transformers does not: {'; '.join(passed_over)}"
    yield from dict.fromkeys(caution for target in targets.values() if (caution := format.caution(*target)))


def _dropped_notes(rows: Sequence[PlanRow], dropped: Sequence[str]) -> Iterator[str]:
    masks = [name for name in dropped if name != TIED_HEAD]
    if TIED_HEAD in dropped or any(row.action == "drop" for row in rows):
        yield f"{TIED_HEAD} is not written: it is {EMBEDDING}"
    if masks:
        yield f"{len(masks)} old mask buffers are left out: {_some(masks)}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _work_bytes(row: PlanRow) -> int:
    """What is alive at once while a row is carried out: the source's tensor, and what is made of it or compared."""
    if row.action == "quantize":
        return row.source.nbytes + _WORK_BYTES_PER_WEIGHT * row.source.numel
    if row.action == "drop":
        return 2 * row.source.nbytes
    return row.source.nbytes + (0 if row.stored[0].dtype == row.dtype else row.out_bytes)


def _bits_per_weight(rows: Iterable[PlanRow]) -> float:
    weights = stored = 0
    for row in rows:
        weights += row.source.numel
        stored += row.out_bytes
    return 8 * stored / weights if weights else 0.0


def _row_dict(row: PlanRow) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": row.name,
        "shape": list(row.shape),
        "dtype": dtype_name(row.dtype),
        "action": row.action,
        "bytes": row.out_bytes,
        "reason": row.reason,
    }
    if row.target is not None:
        entry |= {"grid": row.target.grid.describe(), "quantizer": row.target.quantizer.describe()}
    return entry
