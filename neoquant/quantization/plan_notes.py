"""What a user should know about a plan, a line each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from neoquant.formats import Format
from neoquant.grids import Grid
from neoquant.model.names import EMBEDDING, TIED_HEAD, is_mask_buffer
from neoquant.quantization.plan_rows import UNKNOWN, PlanRow
from neoquant.quantization.recipe import Rule

Targets = Mapping[str, tuple[Grid, tuple[int, int]]]
"""Layer to quantize -> its grid and shape."""


def layer_notes(rows: Sequence[PlanRow], rules: Mapping[str, Rule | None]) -> Iterator[str]:
    """Tensors that no rule decides about, and those that are rounded to another type first."""
    wider = sum(row.target is not None and row.rounded_from != row.dtype for row in rows)
    if wider:
        yield f"{wider} float64 weights are rounded to float32, and then quantized"
    unmatched = [layer for layer, rule in rules.items() if rule is None]
    if unmatched:
        yield f"{len(unmatched)} linears stay in half precision because no rule matches them: {_some(unmatched)}"
    unknown = [row.name for row in rows if row.reason == UNKNOWN]
    if unknown:
        are = "1 tensor is" if len(unknown) == 1 else f"{len(unknown)} tensors are"
        yield f"{are} no part of a GPT-Neo that neoquant knows; kept: {_some(unknown)}"


def grid_notes(targets: Targets) -> Iterator[str]:
    """What the grids say of the weights that they are for."""
    yield from dict.fromkeys(remark for grid, shape in targets.values() if (remark := grid.remark(shape)))


def format_notes(format: Format, targets: Targets, passed_over: Sequence[str]) -> Iterator[str]:
    """Who reads the format, and with what caution."""
    if format.family == "neoquant" and passed_over:
        yield f"only neoquant reads the result, transformers does not: {_some(list(dict.fromkeys(passed_over)), '; ')}"
    yield from dict.fromkeys(caution for target in targets.values() if (caution := format.caution(*target)))


def dropped_notes(drops_head: bool, dropped: Sequence[str]) -> Iterator[str]:
    """What is not written: the tied head, if that stands in the file, and what the reader left out."""
    masks = [name for name in dropped if is_mask_buffer(name)]
    if drops_head or TIED_HEAD in dropped:
        yield f"{TIED_HEAD} is not written: it is {EMBEDDING}"
    if masks:
        yield f"{len(masks)} old mask buffers are left out: {_some(masks)}"


def _some(names: Sequence[str], between: str = ", ") -> str:
    return between.join(names[:3]) + (f"{between}..." if len(names) > 3 else "")
