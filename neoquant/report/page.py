"""A comparison as one self-contained HTML page: no network, no scripts, the same results the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neoquant.report import provenance, summary, svg
from neoquant.report.candidate_section import candidate_section
from neoquant.report.formatting import perplexity, suite_label
from neoquant.report.gather import Gathered
from neoquant.report.heat_maps import inspection_note, layer_heats, subset_heats
from neoquant.report.page_elements import Chart, Heat, Tile, unbroken, visible
from neoquant.report.remarks import remarks
from neoquant.report.subsets import FEW_NOTE, has_few_documents
from neoquant.report.tasks import task_provenance, task_rows
from neoquant.report.verdict import headline, recommended, short_names, subject
from neoquant.sizes import plural


def render_page(gathered: Gathered) -> str:
    """The page of everything in `gathered`, HTML."""
    from jinja2 import Environment, StrictUndefined

    template = (Path(__file__).parent / "page.html.j2").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    return visible(environment.from_string(template).render(page=_Page(gathered)), lines=True)


class _Page:
    """What the template asks for."""

    def __init__(self, gathered: Gathered) -> None:
        self.comparison = result = gathered.comparison
        self.inspected, self.speed, self.compared_tasks = gathered.inspections, gathered.speed, gathered.tasks
        self.light, self.dark = svg.LIGHT, svg.DARK
        self.short = {name: visible(short) for name, short in short_names(result).items()}
        self.version = result.reference.environment.neoquant
        self.reference = result.reference.model.name
        self.title = f"{self.reference}: accuracy loss of quantization"
        self.headline = unbroken(headline(result))
        self.remarks = [unbroken(text) for text in remarks(result)]
        self.has_speed = bool(gathered.speed.programs)
        self.few_note = FEW_NOTE if any(has_few_documents(result.reference)) else ""

    @property
    def subject(self) -> str:
        """The candidate that headline and tiles are about, where the headline does not name it alone."""
        about = subject(self.comparison)
        return "" if about is None else about.evaluation.model.name

    @property
    def tiles(self) -> list[Tile]:
        return summary.tiles(self.comparison, self.speed)

    @property
    def lead(self) -> str:
        reference = self.comparison.reference
        total, suite = reference.total, suite_label(reference.suite)
        return unbroken(
            f"{suite[:1].upper()}{suite[1:]}: {plural(total.documents, 'document')} of "
            f"{plural(len(reference.subsets), 'subset')}, {plural(total.tokens, 'token')}, "
            f"{plural(total.bytes, 'byte')}. "
            f"{self.reference} itself: perplexity {perplexity(total)}, {total.bits_per_byte:.4f} bits a byte."
        )

    @property
    def summary(self) -> list[dict[str, Any]]:
        return summary.summary_rows(self.comparison, self.speed)

    @property
    def overview(self) -> list[Chart]:
        return summary.overview(self.comparison, self.short)

    @property
    def subset_heats(self) -> list[Heat]:
        return subset_heats(self.comparison, self.short)

    @property
    def inspections(self) -> list[dict[str, Any]]:
        return [
            {"name": result.model.name, "note": inspection_note(result), "heats": layer_heats(result)}
            for result in self.inspected
        ]

    @property
    def tasks(self) -> list[dict[str, Any]]:
        return [
            {
                "rows": [{"model": name, **row._asdict()} for name, row in task_rows(t)],
                "with": task_provenance(t.reference),
            }
            for t in self.compared_tasks
        ]

    @property
    def has_passages(self) -> bool:
        return any(candidate.worst_tokens for candidate in self.comparison.candidates)

    @property
    def candidates(self) -> list[dict[str, Any]]:
        result = self.comparison
        opened = recommended(result) or subject(result)
        return [
            candidate_section(result, c, self.short[c.evaluation.model.name], opened=c is opened)
            for c in result.candidates
        ]

    @property
    def method(self) -> list[str]:
        return [unbroken(text) for text in provenance.method(self.comparison)]

    @property
    def facts(self) -> list[tuple[str, str]]:
        return provenance.facts(self.comparison, self.speed)

    @property
    def notes(self) -> list[str]:
        return provenance.notes(self.comparison, self.inspected, self.compared_tasks)
