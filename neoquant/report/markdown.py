"""A comparison in Markdown: a table for a README, and what a model card says was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from neoquant.data.suite import FileData
from neoquant.evaluation.result import Candidate, Change, Comparison, Evaluation
from neoquant.evaluation.task_result import TaskComparison
from neoquant.report.formatting import (
    NONE,
    agreement_interval,
    change_interval,
    divergence,
    divergence_interval,
    number,
    perplexity,
    suite_label,
)
from neoquant.report.measured_speed import NO_SPEED, MeasuredSpeed
from neoquant.report.remarks import remarks
from neoquant.report.subsets import FEW_NOTE, subset_names
from neoquant.report.tasks import task_provenance, task_rows
from neoquant.report.verdict import percent_change, percent_interval, recommended, verdict, verdict_of
from neoquant.sizes import plural, size

MARK = "<!-- neoquant: report -->"
"""The first line of a file of Markdown, by which it is known again; Markdown does not show it."""


def markdown_report(result: Comparison, speed: MeasuredSpeed = NO_SPEED, tasks: Sequence[TaskComparison] = ()) -> str:
    """The verdict, a line for each model, a line for each subset, and one for each metric of each task."""
    sections = [
        " ".join(map(escape_markdown, [verdict(result), *remarks(result)])),
        summary_table(result, speed),
        subset_table(result),
        provenance(result),
        *map(task_table, tasks),
    ]
    return "\n\n".join(sections) + "\n"


def task_table(result: TaskComparison) -> str:
    """A line for each metric of each task and model, and one that says with what."""
    lines = [
        "| task | metric | model | documents | score | Δ, points [95 %] | gained, lost |",
        "| --- | --- | --- | --: | --: | --: | --: |",
    ]
    for name, row in task_rows(result):
        cells = [*map(escape_markdown, (row.task, row.metric, name)), row.documents, f"{row.before} → {row.after}"]
        cells += [f"{row.change} [{row.interval}]", f"{row.gained}, {row.lost}" if row.gained else ""]
        lines.append(f"| {' | '.join(cells)} |")
    base = escape_markdown(result.reference.model.name)
    return "\n".join([*lines, "", f"Against {base}; {escape_markdown(task_provenance(result.reference))}."])


def summary_table(result: Comparison, speed: MeasuredSpeed = NO_SPEED) -> str:
    """A line for each model, the recommended one in bold; speed and memory where they were measured."""
    headings = ["size", "bits/weight: linears, model", "bits/byte", "perplexity", "Δ perplexity [95 %]"]
    headings += ["KL [95 %]", "same top token [95 %]", "verdict", *(("tokens/s", "memory") if speed.programs else ())]
    best = recommended(result)
    lines = [
        f"| model | {' | '.join(headings)} |",
        f"| --- |{' --: |' * len(headings)}",
        _line(result.reference, None, False, speed),
    ]
    lines += [_line(candidate.evaluation, candidate, candidate is best, speed) for candidate in result.candidates]
    return "\n".join(lines)


def subset_table(result: Comparison) -> str:
    """A line for each subset: each candidate's KL where it was measured, else its change."""
    measured = all(candidate.total.kl is not None for candidate in result.candidates)
    names = [escape_markdown(candidate.evaluation.model.name) for candidate in result.candidates]
    what = "KL, nats a token" if measured else "Δ perplexity"
    lines = [f"| {what} | {' | '.join(names)} |", f"| --- |{' --: |' * len(names)}"]
    changes = [[*candidate.subsets, candidate.total] for candidate in result.candidates]
    subsets, few = subset_names(result.reference)
    for place, subset in enumerate(subsets):
        cells = [divergence(row[place].kl) if measured else percent_change(row[place]) for row in changes]
        lines.append(f"| {escape_markdown(subset)} | {' | '.join(cells)} |")
    return "\n".join([*lines, *(["", FEW_NOTE] if few else [])])


def provenance(result: Comparison) -> str:
    """One line: on what, with what."""
    reference = result.reference
    total, machine = reference.total, reference.environment
    return (
        f"{plural(total.documents, 'document')}, {plural(total.tokens, 'token')}, {plural(total.bytes, 'byte')} of "
        f"{escape_markdown(_source_name(reference))} "
        f"({escape_markdown(suite_label(reference.suite))}, sha256 {reference.data.sha256[:12]}); intervals over "
        f"{result.resampling.unit}s; "
        f"{machine.dtype} on {escape_markdown(machine.device)}, neoquant {machine.neoquant}, torch {machine.torch}."
    )


def measured_block(result: Comparison, candidate: Candidate) -> str:
    """What a model card says under "Measured": this candidate against the reference, by subset."""
    befores = [*result.reference.subsets, result.reference.total]
    scores = [*candidate.evaluation.subsets, candidate.evaluation.total]
    changes = [*candidate.subsets, candidate.total]
    lines = [
        f"Against {escape_markdown(result.reference.model.name)}, on the same windows:",
        "",
        "| | perplexity | bits/byte | Δ nats/token [95 %] | KL [95 %] | same top token [95 %] |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for before, score, change in zip(befores, scores, changes, strict=True):
        lines.append(
            f"| {escape_markdown(score.subset)} | {perplexity(before)} → {perplexity(score)} "
            f"| {before.bits_per_byte:.4f} → {score.bits_per_byte:.4f} "
            f"| {change_interval(change)} | {divergence_interval(change)} | {agreement_interval(change)} |"
        )
    return "\n".join([*lines, "", provenance(result)])


def _source_name(result: Evaluation) -> str:
    """Where the text came from; of a file its name, without where it lies on this machine."""
    source = result.data.source
    return Path(source).name if isinstance(result.suite.data, FileData) else source


def _line(result: Evaluation, candidate: Candidate | None, best: bool, speed: MeasuredSpeed) -> str:
    model = result.model
    name = f"**{escape_markdown(model.name)}**" if best else escape_markdown(model.name)
    cells = [
        NONE if model.bytes_on_disk is None else size(model.bytes_on_disk),
        f"{number(model.bits_per_weight_linears)}, {number(model.bits_per_weight_model)}",
        f"{result.total.bits_per_byte:.4f}",
        perplexity(result.total),
        *(_changed(candidate.total) if candidate else [""] * 4),
        *((speed.decode(model.name), speed.memory(model.name)) if speed.programs else ()),
    ]
    return f"| {name} | {' | '.join(cells)} |"


def _changed(change: Change) -> list[str]:
    return [
        f"{percent_change(change)} [{percent_interval(change) or NONE}]",
        divergence_interval(change),
        agreement_interval(change),
        verdict_of(change).state.value,
    ]


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line of a table."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in "\\`*[]|" else c for c in text)
