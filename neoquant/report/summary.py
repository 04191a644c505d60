"""The top of the page: tiles, the table of all candidates, and the charts that set them beside each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from neoquant.evaluation.result import Candidate, Comparison, Evaluation
from neoquant.report import charts
from neoquant.report.formatting import NONE, agreement, agreement_interval, divergence, number, perplexity
from neoquant.report.measured_speed import MeasuredSpeed
from neoquant.report.page_elements import Chart, Tile, chart, unbroken
from neoquant.report.verdict import (
    DIVERGENCE,
    TOLERANCE,
    kl_interval,
    percent_change,
    percent_interval,
    recommended,
    size_ratio,
    subject,
    verdict_of,
)
from neoquant.sizes import size


def tiles(result: Comparison, speed: MeasuredSpeed) -> list[Tile]:
    """Four figures of the candidate that the headline is about; none where there is no candidate."""
    about = subject(result)
    if about is None:
        return []
    return [
        _perplexity_tile(about),
        _divergence_tile(about),
        _size_tile(result, about),
        _speed_tile(result, about, speed),
    ]


def _perplexity_tile(about: Candidate) -> Tile:
    interval = percent_interval(about.total)
    detail = f"95 % interval {interval}" if interval else "one document gives no interval"
    state = verdict_of(about.total).perplexity.value
    return Tile("Perplexity", percent_change(about.total), unbroken(f"{detail}; bound {100 * TOLERANCE:g} %"), state)


def _divergence_tile(about: Candidate) -> Tile:
    state, interval = verdict_of(about.total).kl, kl_interval(about.total)
    if state is None:
        return Tile("KL divergence", NONE, "not measured: saved evaluations have no KL")
    detail = f"nats a token; 95 % interval {interval}" if interval else "nats a token; one document gives no interval"
    return Tile("KL divergence", divergence(about.total.kl), unbroken(f"{detail}; bound {DIVERGENCE:g}"), state.value)


def _size_tile(result: Comparison, about: Candidate) -> Tile:
    model, reference = about.evaluation.model, result.reference.model
    ratio = size_ratio(reference, model)
    bits = "" if model.bits_per_weight_linears is None else f"{model.bits_per_weight_linears:.2f} bits a weight"
    of = "" if ratio is None else f"{100 * ratio:.0f} % of {size(reference.bytes_on_disk or 0)}"
    value = NONE if model.bytes_on_disk is None else size(model.bytes_on_disk)
    return Tile("Size", unbroken(value), unbroken("; ".join(filter(None, (of, bits)))))


def _speed_tile(result: Comparison, about: Candidate, speed: MeasuredSpeed) -> Tile:
    """Speed where a benchmark is given, else how often the top token is the same."""
    name, base = about.evaluation.model.name, result.reference.model.name
    if name not in speed.programs:
        interval = agreement_interval(about.total).partition("[")[2].removesuffix("] %").replace(",", " to")
        detail = f"95 % interval {interval} %" if interval not in ("", NONE) else "share of tokens"
        return Tile("Same top token", agreement(about.total), unbroken(detail))
    times = ""
    if base in speed.programs:
        ratio = speed.programs[name].decode_tokens_per_s / speed.programs[base].decode_tokens_per_s
        times = f"{ratio:.1f} times {base}’s; "
    return Tile("Speed", unbroken(f"{speed.decode(name)} tokens/s"), unbroken(f"{times}{speed.memory(name)} of memory"))


def summary_rows(result: Comparison, speed: MeasuredSpeed) -> list[dict[str, Any]]:
    """The reference, then the candidates from the largest to the smallest."""
    by_size = sorted(result.candidates, key=lambda c: -(c.evaluation.model.bytes_on_disk or math.inf))
    rows: list[tuple[Evaluation, Candidate | None]] = [(result.reference, None)]
    rows += [(candidate.evaluation, candidate) for candidate in by_size]
    return [_summary_row(result, evaluation, candidate, speed) for evaluation, candidate in rows]


def _summary_row(
    result: Comparison, evaluation: Evaluation, candidate: Candidate | None, speed: MeasuredSpeed
) -> dict[str, Any]:
    model = evaluation.model
    ratio = size_ratio(result.reference.model, model)
    change = candidate.total if candidate else None
    return {
        "name": model.name,
        "chosen": candidate is not None and candidate is recommended(result),
        "state": verdict_of(change).state.value if change else "",
        "size": NONE if model.bytes_on_disk is None else unbroken(size(model.bytes_on_disk)),
        "ratio": "" if ratio is None or candidate is None else unbroken(f"{100 * ratio:.0f} %"),
        "bits": number(model.bits_per_weight_linears),
        "perplexity": perplexity(evaluation.total),
        "change": percent_change(change) if change else NONE,
        "interval": (percent_interval(change) or "no interval") if change else "",
        "kl": divergence(change.kl) if change else NONE,
        "kl_interval": (kl_interval(change) or "") if change else "",
        "agreement": agreement(change) if change else NONE,
        "speed": speed.decode(model.name),
        "memory": unbroken(speed.memory(model.name)),
    }


def overview(result: Comparison, short: Mapping[str, str]) -> list[Chart]:
    """Size against quality, the change of perplexity, and how single tokens' divergence is spread."""
    if not result.candidates:
        return []
    made = (_size_chart(result, short), _change_chart(result, short), _spread_chart(result, short))
    return [chart for chart in made if chart is not None]


def _size_chart(result: Comparison, short: Mapping[str, str]) -> Chart | None:
    best = recommended(result)
    points = [
        charts.Point(
            short[c.evaluation.model.name],
            c.evaluation.model.bytes_on_disk / 1e6,
            c.total.kl,
            c.total.kl_low,
            c.total.kl_high,
            c is best,
        )
        for c in result.candidates
        if c.total.kl is not None and c.evaluation.model.bytes_on_disk is not None
    ]
    if not points:
        return None
    mark = ""
    if best and len(result.candidates) > 1:
        mark = f" The filled diamond is {short[best.evaluation.model.name]}."
    title = "Size against KL divergence"
    svg = charts.size_chart(points, "size", title, DIVERGENCE)
    note = (
        f"Lower left is better: smaller, and predictions closer to {result.reference.model.name}’s. Bars are 95 % "
        f"intervals.{_bound_note(svg, f'{DIVERGENCE:g} nats')}{mark}"
    )
    return chart(title, note, svg)


def _change_chart(result: Comparison, short: Mapping[str, str]) -> Chart:
    best = recommended(result)
    title = "Change of perplexity"
    rows = [charts.Interval.of_change(short[c.evaluation.model.name], c.total, c is best) for c in result.candidates]
    svg = charts.interval_chart(rows, "change", title, "change of perplexity, %", 100 * TOLERANCE)
    note = (
        f"In per cent of {result.reference.model.name}’s, with 95 % intervals. An interval across zero shows no "
        f"change.{_bound_note(svg, f'{100 * TOLERANCE:g} %')}"
    )
    return chart(title, note, svg)


def _spread_chart(result: Comparison, short: Mapping[str, str]) -> Chart | None:
    best = recommended(result)
    spreads = [
        charts.Spread(short[c.evaluation.model.name], d.quantiles, d.mean, d.maximum, c is best)
        for c in result.candidates
        if (d := c.total.divergence) is not None
    ]
    if not spreads:
        return None
    title = "KL divergence of single tokens"
    note = (
        "Thick: the middle half of all tokens, with a gap at the median. Thin: 1 to 99.9 %. Tick: 99 %. Diamond: mean. "
        "Cross: the largest."
    )
    return chart(title, note, charts.spread_chart(spreads, "spread", title, "KL divergence of a token, nats"))


def _bound_note(svg: str, bound: str) -> str:
    """What the dashed line is, if the chart has one."""
    return f" The dashed line is the bound, {bound}." if "stroke-dasharray" in svg else ""
