"""A sweep's results together: one page or several with an index, and a table in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from neoquant.evaluation.result import Comparison
from neoquant.report import svg
from neoquant.report.formatting import (
    NONE,
    agreement_interval,
    change_interval,
    divergence_interval,
    number,
    perplexity,
)
from neoquant.report.gather import Gathered
from neoquant.report.markdown import escape_markdown
from neoquant.report.page import render_page
from neoquant.report.page_elements import visible
from neoquant.report.verdict import figures, headline, subject, verdict_of
from neoquant.sizes import plural, size

INDEX = "report.html"


def sweep_pages(results: Sequence[Comparison]) -> dict[str, str]:
    """The page of one comparison, or one for each and an index that links to them: path in the sweep's folder -> HTML.

    The results' names must be fit for files: `sweep` accepts no others.
    """
    if len(results) == 1:
        return {INDEX: render_page(Gathered(results[0], ()))}
    pages = {page_path(result): render_page(Gathered(result, ())) for result in results}
    return {**pages, INDEX: _index(results)}


def page_path(result: Comparison) -> str:
    """Beside the comparison's JSON."""
    return f"results/{result.reference.model.name}-{result.reference.suite.name}.html"


def sweep_table(results: Sequence[Comparison]) -> str:
    """Markdown: a line for every model on every suite."""
    headings = ["suite", "size", "bits/weight", "bits/byte", "perplexity", "Δ nats/token [95 %]", "KL [95 %]"]
    headings += ["same top token [95 %]", "verdict"]
    lines = [f"| model | {' | '.join(headings)} |", f"| --- | --- |{' --: |' * (len(headings) - 1)}"]
    for result in results:
        for evaluation, change in [(result.reference, None), *((c.evaluation, c.total) for c in result.candidates)]:
            model, total = evaluation.model, evaluation.total
            cells = [escape_markdown(evaluation.suite.name)]
            cells += [NONE if model.bytes_on_disk is None else size(model.bytes_on_disk)]
            cells += [number(model.bits_per_weight_model), f"{total.bits_per_byte:.4f}", perplexity(total)]
            if change:
                cells += [change_interval(change), divergence_interval(change), agreement_interval(change)]
            cells += [verdict_of(change).state.value] if change else [""] * 4
            lines.append(f"| {escape_markdown(model.name)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _index(results: Sequence[Comparison]) -> str:
    from jinja2 import Environment, StrictUndefined

    template = (Path(__file__).parent / "sweep.html.j2").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    rows = []
    for result in results:
        about = subject(result)
        rows.append(
            {
                "href": page_path(result),
                "name": f"{result.reference.model.name} on {result.reference.suite.name}",
                "headline": headline(result),
                "figures": "" if about is None else f"{about.evaluation.model.name}: {figures(result, about)}",
            }
        )
    version = results[0].reference.environment.neoquant if results else ""
    title = plural(len(results), "comparison")
    text = environment.from_string(template).render(
        rows=rows, version=version, title=title, light=svg.LIGHT, dark=svg.DARK
    )
    return visible(text, lines=True)
