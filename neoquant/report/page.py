"""A comparison as one self-contained HTML page: no network, no scripts, the same results the same bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from neoquant.evaluation.inspection_result import Inspection
from neoquant.evaluation.result import Candidate, Change, Evaluation, ModelInfo
from neoquant.model.names import BLOCK_LINEARS
from neoquant.report import charts
from neoquant.report.candidate import candidate_part
from neoquant.report.formatting import (
    NONE,
    agreement,
    change_interval,
    divergence,
    nats_interval,
    number,
    perplexity,
    signed,
    suite_words,
)
from neoquant.report.gather import Gathered
from neoquant.report.layers import Measure, grid_text, measures_of, shades
from neoquant.report.parts import Cell, Chart, Heat, HeatRow, chart, unbroken, visible
from neoquant.report.verdict import (
    DIVERGENCE,
    TOLERANCE,
    percent_change,
    percent_interval,
    recommended,
    remarks,
    short_names,
    size_ratio,
    verdict,
)


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
        self.chosen = recommended(result)
        self.light, self.dark = charts.LIGHT, charts.DARK
        self.short = {name: visible(short) for name, short in short_names(result).items()}
        self.version = result.reference.environment.neoquant
        self.reference = result.reference.model.name
        self.title = f"What quantizing {self.reference} cost"
        self.verdict, *self.remarks = [unbroken(text) for text in (verdict(result), *remarks(result))]
        self._inspections = gathered.inspections
        self._has_kl = all(candidate.total.kl is not None for candidate in result.candidates)

    @property
    def lead(self) -> str:
        reference = self.comparison.reference
        total = reference.total
        return (
            f"{suite_words(reference.suite)[:1].upper()}{suite_words(reference.suite)[1:]}: "
            f"{_count(total.documents, 'document')} of "
            f"{_count(len(reference.subsets), 'subset')}, {total.tokens:,} tokens, {total.bytes:,} bytes. "
            f"{self.reference} itself: perplexity {perplexity(total)}, {total.bits_per_byte:.4f} bits a byte."
        )

    @property
    def summary(self) -> list[dict[str, Any]]:
        reference = self.comparison.reference
        rows = [self._summary_row(reference, None)]
        by_size = sorted(self.comparison.candidates, key=lambda c: -(c.evaluation.model.bytes_on_disk or math.inf))
        return rows + [self._summary_row(candidate.evaluation, candidate) for candidate in by_size]

    def _summary_row(self, result: Evaluation, candidate: Candidate | None) -> dict[str, Any]:
        model = result.model
        ratio = size_ratio(self.comparison.reference.model, model)
        change = candidate.total if candidate else None
        interval = percent_interval(change) if change else None
        return {
            "name": model.name,
            "chosen": candidate is not None and candidate is self.chosen,
            "megabytes": _megabytes(model),
            "ratio": NONE if ratio is None or candidate is None else f"{100 * ratio:.0f} %",
            "bits": number(model.bits_per_weight_linears),
            "perplexity": perplexity(result.total),
            "change": percent_change(change) if change else NONE,
            "interval": interval or NONE,
            "kl": divergence(change.kl) if change else NONE,
            "agreement": agreement(change) if change else NONE,
        }

    @property
    def overview(self) -> list[Chart]:
        candidates = self.comparison.candidates
        if not candidates:
            return []
        made = []
        points = [
            charts.Point(
                self._short(c),
                (c.evaluation.model.bytes_on_disk or 0) / 1e6,
                c.total.kl,
                c.total.kl_error,
                c is self.chosen,
            )
            for c in candidates
            if c.total.kl is not None and c.evaluation.model.bytes_on_disk is not None
        ]
        mark = f" The filled diamond is {self._short(self.chosen)}." if self.chosen and len(candidates) > 1 else ""
        if points:
            title = "Size against quality"
            svg = charts.size_chart(points, "size", title, DIVERGENCE)
            note = (
                f"Lower left is better: fewer megabytes, and predictions closer to {self.reference}’s. Bars are 95 % "
                f"intervals.{_bound_note(svg, f'{DIVERGENCE:g} nats')}{mark}"
            )
            made.append(chart(title, note, svg))
        title = "Change of perplexity"
        rows = [charts.Interval.of_change(self._short(c), c.total, c is self.chosen) for c in candidates]
        svg = charts.interval_chart(rows, "change", title, "change of perplexity, %", 100 * TOLERANCE)
        note = (
            f"In per cent of {self.reference}’s, with 95 % intervals. An interval across zero means that no change "
            f"could be told.{_bound_note(svg, f'{100 * TOLERANCE:g} %')}"
        )
        made.append(chart(title, note, svg))
        spreads = [
            charts.Spread(self._short(c), d.quantiles, d.mean, d.maximum, c is self.chosen)
            for c in candidates
            if (d := c.total.divergence) is not None
        ]
        if spreads:
            title = "How far single tokens diverge"
            note = (
                "Thick: the middle half of all tokens, the gap in it their median. Thin: 1 to 99.9 %. Tick: 99 %. "
                "Diamond: mean. Cross: the worst token."
            )
            made.append(
                chart(title, note, charts.spread_chart(spreads, "spread", title, "KL divergence of a token, nats"))
            )
        return made

    @property
    def subset_note(self) -> str:
        return (
            f"Each candidate against {self.reference} on the parts of the text, in the same order throughout. "
            "The deeper the ground, the larger the figure."
        )

    @property
    def subset_heats(self) -> list[Heat]:
        candidates = self.comparison.candidates
        if not candidates:
            return []
        names = [change.subset for change in candidates[0].subsets] + ["total"]
        heats = []
        if self._has_kl:
            heats.append(
                self._subset_heat(
                    "KL divergence, mean nats a token", names, lambda c: c.kl, divergence, logarithmic=True
                )
            )
        heats.append(
            self._subset_heat(
                "Change of perplexity, %",
                names,
                lambda c: c.nats_per_token,
                lambda v: _signed_percent(v),
                logarithmic=False,
            )
        )
        return heats

    def _subset_heat(
        self,
        caption: str,
        names: Sequence[str],
        value: Callable[[Change], float | None],
        write: Callable[[float], str],
        *,
        logarithmic: bool,
    ) -> Heat:
        candidates = self.comparison.candidates
        columns = [[*c.subsets, c.total] for c in candidates]
        values = [v for column in columns for change in column if (v := value(change)) is not None]
        shade = shades(values) if logarithmic else _linear(values)
        rows = []
        for place, name in enumerate(names):
            cells = []
            for column in columns:
                v = value(column[place])
                title = change_interval(column[place]) + " nats a token"
                cells.append(Cell(NONE) if v is None else Cell(write(v), f"{shade(v):.2f}", title))
            rows.append(HeatRow(name, cells, place == len(names) - 1))
        return Heat(caption, "subset", [self._short(c) for c in candidates], rows)

    @property
    def inspections(self) -> list[dict[str, Any]]:
        parts = []
        for result in self._inspections:
            together = result.together
            note = (
                f"On {_count(result.windows, 'window')} of {suite_words(result.suite)}, {result.tokens:,} tokens. "
                "The whole model there: "
                f"KL {divergence(together.kl)}, change "
                f"{nats_interval(together.nats_per_token, together.low, together.high)} nats a token."
            )
            losses = [layer.loss for layer in result.layers if layer.loss]
            if losses:
                note += f" The KL of the layers alone add up to {divergence(sum(loss.kl for loss in losses))}."
            heats = [_layer_heat(result, measure) for measure in reversed(measures_of(result))]
            parts.append({"name": result.model.name, "note": note, "heats": heats})
        return parts

    @property
    def has_passages(self) -> bool:
        return any(candidate.worst_tokens for candidate in self.comparison.candidates)

    @property
    def candidates(self) -> list[dict[str, Any]]:
        opened = self.chosen or next(iter(self.comparison.candidates), None)
        return [
            candidate_part(self.comparison, c, self._short(c), opened=c is opened) for c in self.comparison.candidates
        ]

    @property
    def method(self) -> str:
        unit = self.comparison.resampling.unit
        return (
            "Every model read the same windows, and every scored token was compared one by one. Perplexity is exp "
            "of the mean "
            "of −log p of the token that comes next. KL is the divergence of a candidate’s prediction from the "
            "reference’s over the whole "
            f"vocabulary, averaged over tokens. Intervals hold 95 % and come from how the {unit}s differ among "
            "themselves: another sample of "
            f"such {unit}s would give other figures. “Same top token” is the share of places where both find the "
            "same token likeliest, "
            "with its standard error. "
            f"The verdict asks that the upper ends of both intervals stay below {100 * TOLERANCE:g} % of perplexity "
            f"and {DIVERGENCE:g} nats of KL: perplexity alone is blind where the text is hard for the reference "
            "itself; KL is what the loss would rise by on text that the reference wrote."
        )

    @property
    def facts(self) -> list[tuple[str, str]]:
        reference = self.comparison.reference
        data, machine = reference.data, reference.environment
        facts = [
            (
                "data",
                f"{data.source}{f' at {data.revision}' if data.revision else ''}; sha256 of the documents "
                f"{data.sha256}",
            ),
            ("suite", suite_words(reference.suite)),
            ("tokenizer", f"sha256 {data.tokenizer_sha256}"),
            ("reference", _model_facts(reference.model)),
        ]
        facts += [
            (visible(c.evaluation.model.name), _model_facts(c.evaluation.model)) for c in self.comparison.candidates
        ]
        facts.append(
            (
                "computed with",
                f"neoquant {machine.neoquant}, torch {machine.torch}, Python {machine.python} on {machine.platform}",
            )
        )
        facts.append(("in", f"{machine.dtype} on {machine.device}, {_count(machine.threads, 'thread')}"))
        made = sorted(
            {
                f"{e.created}, {e.seconds:,.0f} s"
                for e in (reference, *(c.evaluation for c in self.comparison.candidates))
            }
        )
        return [*facts, ("at", "; ".join(made))]

    @property
    def notes(self) -> list[str]:
        notes = [
            note
            for e in (self.comparison.reference, *(c.evaluation for c in self.comparison.candidates))
            for note in e.notes
        ]
        notes += [f"{i.model.name}, layer by layer: {note}" for i in self._inspections for note in i.notes]
        return list(dict.fromkeys(notes))

    def _short(self, candidate: Candidate) -> str:
        return self.short[candidate.evaluation.model.name]


def _bound_note(svg: str, bound: str) -> str:
    """What the dashed line is, if the chart has one."""
    return f" The dashed line is the verdict’s bound, {bound}." if "stroke-dasharray" in svg else ""


def _layer_heat(result: Inspection, measure: Measure) -> Heat:
    values = [value for layer in result.layers if (value := measure.value(layer)) is not None and layer.weight_error]
    shade = shades(values)
    rows = []
    for block in sorted({layer.block for layer in result.layers}):
        row = {layer.projection: layer for layer in result.layers if layer.block == block}
        cells = []
        for name in BLOCK_LINEARS:
            layer = row.get(name)
            value = measure.value(layer) if layer is not None else None
            if layer is None or value is None or not layer.weight_error:
                cells.append(Cell(NONE, title="not changed"))
            else:
                cells.append(Cell(measure.write(value), f"{shade(value):.2f}", f"{layer.name}: {grid_text(layer)}"))
        rows.append(HeatRow(f"{block} {next(iter(row.values())).attention}", cells))
    return Heat(measure.title, "block", [name.rpartition(".")[2] for name in BLOCK_LINEARS], rows)


def _linear(values: Sequence[float]) -> Callable[[float], float]:
    """Where a value lies between 0 and the largest; what lies below 0 is 0."""
    most = max(values, default=0.0)
    return lambda value: max(0.0, value) / most if most > 0 else 0.0


def _model_facts(model: ModelInfo) -> str:
    recipe = f"recipe {model.recipe.get('name', 'of its own')}" if model.recipe else None
    calibration = model.calibration
    parts = [
        model.source or model.name,
        f"revision {model.revision}" if model.revision else None,
        recipe,
        model.format and f"format {model.format}",
        calibration and _calibrated(calibration),
        f"{_megabytes(model)} MB" if model.bytes_on_disk is not None else None,
        model.sha256 and f"sha256 of the weights {model.sha256}",
    ]
    return ", ".join(str(part) for part in parts if part)


def _calibrated(calibration: dict[str, Any]) -> str:
    rows, length = calibration.get("rows"), calibration.get("length")
    return f"calibrated on {calibration.get('source')}, {rows} rows of {length} tokens, seed {calibration.get('seed')}"


def _megabytes(model: ModelInfo) -> str:
    return NONE if model.bytes_on_disk is None else f"{model.bytes_on_disk / 1e6:,.1f}"


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _signed_percent(nats: float) -> str:
    return signed(charts.percent(nats), 2)
