"""Results as tables for a terminal: renderables for rich, made of nothing but the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from neoquant.evaluation.result import Candidate, Comparison, Evaluation, Score
from neoquant.report.formatting import NONE, agreement, change_interval, divergence, number, perplexity, suite_words


class Column(NamedTuple):
    """A heading and one cell for every subset, the total's last."""

    heading: str
    cells: Sequence[str]


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
        Text(f"{result.model.name} on {suite_words(result.suite)}"),
        _by_subset(scores, columns),
        Text(_models_line(result), style="dim"),
    )


def comparison_table(result: Comparison) -> RenderableType:
    """What each candidate lost: a table by subset for each, then one line a model."""
    parts: list[RenderableType] = [Text(suite_words(result.reference.suite)), Text(_amount(result.reference.total))]
    for candidate in result.candidates:
        parts += [Text(), CandidateTable(result.reference, candidate)]
    return Group(*parts, Text(), summary_table(result), _legend(result))


class CandidateTable:
    """One candidate beside the reference, by subset: one table, or two below each other where it would not fit."""

    def __init__(self, reference: Evaluation, candidate: Candidate) -> None:
        other = candidate.evaluation
        self.title = f"{other.model.name} against {reference.model.name}"
        self.scores = [*other.subsets, other.total]
        pairs = list(zip([*reference.subsets, reference.total], self.scores, strict=True))
        changes = [*candidate.subsets, candidate.total]
        self.levels = [
            Column("perplexity", [f"{perplexity(a)} → {perplexity(b)}" for a, b in pairs]),
            Column("bits/byte", [f"{a.bits_per_byte:.4f} → {b.bits_per_byte:.4f}" for a, b in pairs]),
        ]
        self.differences = [
            Column("Δ nats/token [95 %]", [change_interval(change) for change in changes]),
            Column("top-1 agreement", [agreement(change) for change in changes]),
            Column("KL", [divergence(change.kl) for change in changes]),
        ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield Text(self.title, style="bold")
        wide = _by_subset(self.scores, self.levels + self.differences)
        unbounded = options.update(max_width=1000)
        if Measurement.get(console, unbounded, wide).maximum <= options.max_width:
            yield wide
        else:
            yield _by_subset(self.scores, self.levels)
            yield _by_subset(self.scores, self.differences)


def summary_table(result: Comparison) -> Table:
    """One line a model: what it takes on disk, and what it loses in total."""
    table = _table("model")
    for heading in ("MB", "bits/weight", "linears", "perplexity", "bits/byte", "KL"):
        table.add_column(heading, justify="right", no_wrap=True)
    kl = [NONE, *(divergence(candidate.total.kl) for candidate in result.candidates)]
    evaluations = [result.reference, *(candidate.evaluation for candidate in result.candidates)]
    for evaluation, lost in zip(evaluations, kl, strict=True):
        model, total = evaluation.model, evaluation.total
        table.add_row(
            Text(model.name),  # a name is no markup
            NONE if model.bytes_on_disk is None else f"{model.bytes_on_disk / 1e6:,.1f}",
            number(model.bits_per_weight_model),
            number(model.bits_per_weight_linears),
            perplexity(total),
            f"{total.bits_per_byte:.4f}",
            lost,
        )
    return table


def _by_subset(scores: Sequence[Score], columns: Sequence[Column]) -> Table:
    table = _table("subset")
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=True)
    last = len(scores) - 1
    for row, score in enumerate(scores):
        cells = [column.cells[row] for column in columns]
        table.add_row(Text(score.subset), *cells, style="bold" if row == last else "", end_section=row == last - 1)
    return table


def _table(first: str) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(first, overflow="ellipsis")  # the only one that gives way: figures are never cut
    return table


def _amount(total: Score) -> str:
    return f"{total.documents:,} documents, {total.tokens:,} tokens, {total.bytes:,} bytes"


def _models_line(result: Evaluation) -> str:
    environment = result.environment
    return f"{environment.dtype} on {environment.device}, {result.seconds:,.1f} s, data {result.data.sha256[:12]}"


def _legend(result: Comparison) -> Text:
    unit = result.resampling.unit
    return Text(
        f"Δ: change and its 95 % interval over {unit}s · KL: mean nats a token\n{_models_line(result.reference)}",
        style="dim",
    )
