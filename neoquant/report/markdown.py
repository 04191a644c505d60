"""A comparison in Markdown: a table for a README, and what a model card says was measured."""

from __future__ import annotations

from neoquant.evaluation.result import Candidate, Comparison, Evaluation
from neoquant.report.formatting import NONE, agreement, change_interval, divergence, number, perplexity, suite_words
from neoquant.report.verdict import percent_change, percent_interval, recommended, remarks, verdict


def markdown_report(result: Comparison) -> str:
    """The verdict, a line for each model, and a line for each subset."""
    return (
        "\n\n".join(
            [
                " ".join(map(_escape, [verdict(result), *remarks(result)])),
                summary_table(result),
                subset_table(result),
                provenance(result),
            ]
        )
        + "\n"
    )


def summary_table(result: Comparison) -> str:
    """A line for each model, the recommended one in bold."""
    lines = [
        "| model | MB | bits/weight: linears, model | bits/byte | perplexity | Δ perplexity [95 %] | top-1 | KL |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
        _line(result.reference, None, False),
    ]
    best = recommended(result)
    lines += [_line(candidate.evaluation, candidate, candidate is best) for candidate in result.candidates]
    return "\n".join(lines)


def subset_table(result: Comparison) -> str:
    """A line for each subset: each candidate's KL where it was measured, else its change."""
    measured = all(candidate.total.kl is not None for candidate in result.candidates)
    names = [_escape(candidate.evaluation.model.name) for candidate in result.candidates]
    what = "KL, nats a token" if measured else "Δ perplexity"
    lines = [f"| {what} | {' | '.join(names)} |", f"| --- |{' --: |' * len(names)}"]
    changes = [[*candidate.subsets, candidate.total] for candidate in result.candidates]
    for place, score in enumerate([*result.reference.subsets, result.reference.total]):
        cells = [divergence(row[place].kl) if measured else percent_change(row[place]) for row in changes]
        lines.append(f"| {_escape(score.subset)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def provenance(result: Comparison) -> str:
    """One line: on what, with what."""
    reference = result.reference
    total, machine = reference.total, reference.environment
    return (
        f"{total.documents:,} documents, {total.tokens:,} tokens, {total.bytes:,} bytes of "
        f"{_escape(reference.data.source)} "
        f"({_escape(suite_words(reference.suite))}, sha256 {reference.data.sha256[:12]}); intervals over "
        f"{result.resampling.unit}s; "
        f"{machine.dtype} on {_escape(machine.device)}, neoquant {machine.neoquant}, torch {machine.torch}."
    )


def measured_block(result: Comparison, candidate: Candidate) -> str:
    """What a model card says under "Measured": this candidate against the reference, by subset."""
    befores = [*result.reference.subsets, result.reference.total]
    scores = [*candidate.evaluation.subsets, candidate.evaluation.total]
    changes = [*candidate.subsets, candidate.total]
    lines = [
        f"Against {_escape(result.reference.model.name)}, on the same windows:",
        "",
        "| | perplexity | bits/byte | Δ nats/token [95 %] | top-1 agreement | KL |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for before, score, change in zip(befores, scores, changes, strict=True):
        lines.append(
            f"| {_escape(score.subset)} | {perplexity(before)} → {perplexity(score)} "
            f"| {before.bits_per_byte:.4f} → {score.bits_per_byte:.4f} "
            f"| {change_interval(change)} | {agreement(change)} | {divergence(change.kl)} |"
        )
    return "\n".join([*lines, "", provenance(result)])


def _line(result: Evaluation, candidate: Candidate | None, best: bool) -> str:
    model = result.model
    name = f"**{_escape(model.name)}**" if best else _escape(model.name)
    size = NONE if model.bytes_on_disk is None else f"{model.bytes_on_disk / 1e6:,.1f}"
    change = candidate.total if candidate else None
    interval = percent_interval(change) if change else None
    cost = "" if change is None else f"{percent_change(change)} [{interval or NONE}]"
    return (
        f"| {name} | {size} | {number(model.bits_per_weight_linears)}, {number(model.bits_per_weight_model)} "
        f"| {result.total.bits_per_byte:.4f} | {perplexity(result.total)} | {cost} "
        f"| {agreement(change) if change else ''} | {divergence(change.kl) if change else ''} |"
    )


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line of a table."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in "\\`*[]|" else c for c in text)
