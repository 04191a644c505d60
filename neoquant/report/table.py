"""Results as tables for a terminal: renderables for rich, made of nothing but the result."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from neoquant.evaluation.result import Candidate, Comparison, Evaluation, Score
from neoquant.report.escaping import escape_controls
from neoquant.report.formatting import (
    NONE,
    agreement_interval,
    change_interval,
    divergence_interval,
    duration,
    number,
    perplexity,
    suite_label,
)
from neoquant.report.measured_speed import NO_SPEED, MeasuredSpeed
from neoquant.report.split_table import Column, SplitTable
from neoquant.report.subsets import FEW_NOTE, subset_names
from neoquant.sizes import plural, size


def evaluation_table(result: Evaluation) -> RenderableType:
    """What one model scored, by subset."""
    scores = [*result.subsets, result.total]
    columns = [
        Column("docs", [f"{s.documents:,}" for s in scores]),
        Column("tokens", [f"{s.tokens:,}" for s in scores]),
        Column("bytes", [f"{s.bytes:,}" for s in scores]),
        Column("nats/tok", [f"{s.nats_per_token:.4f}" for s in scores]),
        Column("perplexity", [perplexity(s) for s in scores]),
        Column("bits/byte", [f"{s.bits_per_byte:.4f}" for s in scores]),
    ]
    if result.suite.prepare == "wikitext" or result.suite.protocol == "last-word":
        columns.append(Column("word ppl", [number(s.word_perplexity) for s in scores]))
    if result.total.accuracy is not None:
        columns.append(Column("accuracy", [f"{100 * (s.accuracy or 0):.2f} %" for s in scores]))
    return Group(
        Text(escape_controls(f"{result.model.name} on {suite_label(result.suite)}")),
        SplitTable("subset", [score.subset for score in scores], columns, total=True),
        Text(_computed_with(result), style="dim"),
    )


def comparison_table(result: Comparison, speed: MeasuredSpeed = NO_SPEED) -> RenderableType:
    """How each candidate differs from the reference: a table by subset for each, then one line a model."""
    suite = escape_controls(suite_label(result.reference.suite))
    sections: list[RenderableType] = [Text(suite), Text(_amount(result.reference.total))]
    for candidate in result.candidates:
        sections += [Text(), *_candidate_table(result.reference, candidate)]
    return Group(*sections, Text(), summary_table(result, speed), Text(_legend(result), style="dim"))


def _candidate_table(reference: Evaluation, candidate: Candidate) -> list[RenderableType]:
    """One candidate beside the reference, by subset."""
    other = candidate.evaluation
    scores = [*other.subsets, other.total]
    pairs = list(zip([*reference.subsets, reference.total], scores, strict=True))
    changes = [*candidate.subsets, candidate.total]
    columns = [
        Column("perplexity", [f"{perplexity(a)} → {perplexity(b)}" for a, b in pairs]),
        Column("bits/byte", [f"{a.bits_per_byte:.4f} → {b.bits_per_byte:.4f}" for a, b in pairs]),
        Column("Δ nats/token [95 %]", [change_interval(change) for change in changes]),
        Column("KL [95 %]", [divergence_interval(change) for change in changes]),
        Column("same top token [95 %]", [agreement_interval(change) for change in changes]),
    ]
    names, few = subset_names(other)
    table = SplitTable("subset", names, columns, total=True)
    title = Text(escape_controls(f"{other.model.name} against {reference.model.name}"), style="bold")
    return [title, table, *([Text(FEW_NOTE, style="dim")] if few else [])]


def summary_table(result: Comparison, speed: MeasuredSpeed = NO_SPEED) -> SplitTable:
    """One line a model: its size, its accuracy loss in total, and its speed where that was measured."""
    models = [evaluation.model for evaluation in result.evaluations]
    columns = [
        Column("size", [NONE if m.bytes_on_disk is None else size(m.bytes_on_disk) for m in models]),
        Column("bits/weight", [number(m.bits_per_weight_model) for m in models]),
        Column("linears", [number(m.bits_per_weight_linears) for m in models]),
        Column("perplexity", [perplexity(e.total) for e in result.evaluations]),
        Column("bits/byte", [f"{e.total.bits_per_byte:.4f}" for e in result.evaluations]),
        Column("KL [95 %]", [NONE, *(divergence_interval(candidate.total) for candidate in result.candidates)]),
    ]
    names = [model.name for model in models]
    return SplitTable("model", names, [*columns, *speed_columns(names, speed)])


def speed_columns(names: Sequence[str], speed: MeasuredSpeed) -> list[Column]:
    """Decoding speed and peak memory of the models that were measured; no column where none was."""
    if not any(name in speed.programs for name in names):
        return []
    return [
        Column("tokens/s", [speed.decode(name) for name in names]),
        Column("memory", [speed.memory(name) for name in names]),
    ]


def _amount(total: Score) -> str:
    return f"{plural(total.documents, 'document')}, {plural(total.tokens, 'token')}, {plural(total.bytes, 'byte')}"


def _computed_with(result: Evaluation) -> str:
    environment = result.environment
    return f"{environment.dtype} on {environment.device}, {duration(result.seconds)}, data {result.data.sha256[:12]}"


def _legend(result: Comparison) -> str:
    unit = result.resampling.unit
    return (
        f"Δ: change of −log p · KL: mean KL divergence, nats a token · [95 %]: interval over {unit}s\n"
        f"{_computed_with(result.reference)}"
    )
