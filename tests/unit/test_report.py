"""Pages, Markdown and cards say what the results say, whatever names and texts hold."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from results import (
    HOSTILE,
    SUBSETS,
    make_candidate,
    make_change,
    make_comparison,
    make_evaluation,
    make_inspection,
)

from neoquant.benchmark.run import Program, Run, Speed
from neoquant.errors import DataError, RequestError
from neoquant.evaluation import Comparison
from neoquant.evaluation.inspection_result import Inspection
from neoquant.quantization.model_card import with_measured
from neoquant.report.chart_labels import name_points
from neoquant.report.charts import Point
from neoquant.report.gather import Gathered, gather
from neoquant.report.markdown import markdown_report, measured_block
from neoquant.report.page import render_page
from neoquant.report.page_elements import visible
from neoquant.report.remarks import remarks
from neoquant.report.svg import drawing
from neoquant.report.sweep import page_path, sweep_pages, sweep_table
from neoquant.report.verdict import (
    State,
    headline,
    percent_change,
    recommended,
    short_names,
    state_of,
    verdict,
    verdict_of,
)
from neoquant.sizes import size

VOID = {"meta", "link", "br", "hr", "img", "input", "path", "use", "rect"}


class Parsed(HTMLParser):
    """A page as a browser reads it: that every element is closed in order, and what it says."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "action", "data", "poster", "srcset"):
                self.targets.append(value or "")
            assert not name.startswith("on")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.handle_starttag(tag, attrs)
        self.open.pop()
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.text.append(data)

    @property
    def said(self) -> str:
        return " ".join("".join(self.text).split())


def page(*results: Comparison | Inspection) -> tuple[str, Parsed]:
    comparison, *inspections = results
    assert isinstance(comparison, Comparison)
    html = render_page(Gathered(comparison, tuple(i for i in inspections if isinstance(i, Inspection))))
    parsed = Parsed(html)
    assert "script" not in parsed.tags and "link" not in parsed.tags and "img" not in parsed.tags
    assert not re.search(r"url\((?!#)|@import|https?://", html)  # nothing to fetch
    assert len(parsed.ids) == len(set(parsed.ids))
    references = {target.removeprefix("#") for target in parsed.targets if target.startswith("#")}
    assert references | set(re.findall(r"url\(#([^)]+)\)", html)) <= set(parsed.ids)
    assert all(target.startswith("#") for target in parsed.targets)
    return html, parsed


def test_the_page_holds_the_figures() -> None:
    two = make_comparison(
        make_candidate("gpt-neo-1.3B-nf4", 0.004, sha256="f" * 64, recipe={"name": "nf4"}),
        make_candidate("gpt-neo-1.3B-int8", 0.0001, bytes_on_disk=1_400_000_000),
    )
    html, parsed = page(two, make_inspection("gpt-neo-1.3B-nf4"))
    said = parsed.said
    assert html.startswith("<!DOCTYPE html>") and '<html lang="en">' in html
    assert headline(two) in said
    assert said.count("✓ passes") == 2 + 2 + 2  # tiles, table, sections
    for candidate in two.candidates:
        model, change = candidate.evaluation.model, candidate.total
        assert said.count(model.name) >= 3
        assert size(model.bytes_on_disk or 0) in said.replace("\u00a0", " ")
        assert percent_change(change) in said and f"{change.kl:.5f}" in said
        assert f"[{change.low:+.4f}, {change.high:+.4f}]".replace("-", "−") in said
        assert "96.80 [96.56, 97.04] %" in said and "0.00065 [0.00060, 0.00071]" in said
    for figure in (
        "0.85",
        "1.23",
        "0.61",
        "0.00321",
        "3.21",
        "“ the” 31.0 %",
        "“ the” 2.0 %",
        "“ of” 20.0 %",
        "“\\xe2” 25.0 %",
        "1,234,567",
    ):
        assert figure in said, figure
    for subset in SUBSETS:
        assert said.count(subset) >= 4
    for fact in ("ab" * 32, "f" * 64, "recipe nf4", "torch 2", "something to know", "2026-01-01"):
        assert fact in said
    assert len(re.findall("<svg", html)) == 3 + 2 * 3
    assert re.search(r"<details open>\s*<summary>gpt-neo-1.3B-nf4", html)  # the recommended one


def test_the_page_works_without_script_style_or_colour() -> None:
    """Tokens that changed differ in more than their ground, figures stand in every shaded cell."""
    html, _ = page(make_comparison(make_candidate("m-nf4")), make_inspection("m-nf4"))
    assert ".down" in html and "text-decoration-style:dotted" in html
    assert '<span class="up here"' in html and '<span class="down"' in html
    assert not re.search(r'<td style="--h:[^"]*"[^>]*></td>', html)
    assert all(f"prefers-color-scheme:{word}" in html for word in ("dark",)) and "@media print" in html


def test_the_same_results_give_the_same_bytes() -> None:
    result = make_comparison(make_candidate("m-a", 0.2), make_candidate("m-b"))
    assert page(result, make_inspection("m-a"))[0] == page(result, make_inspection("m-a"))[0]
    assert markdown_report(result) == markdown_report(result)


def test_hostile_names_and_texts_are_text() -> None:
    named = make_candidate(f"m-{HOSTILE}", text=HOSTILE)
    html, parsed = page(make_comparison(named, base=f"m{HOSTILE}"), make_inspection(HOSTILE))
    assert "<script" not in html and "&lt;script&gt;" in html
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", html)
    html.encode("utf-8")
    assert "␀␛[31m$\\alpha$" in parsed.said  # as it is, controls as their pictures
    text = markdown_report(make_comparison(named))
    assert "<script" not in text


def test_visible() -> None:
    assert visible("a\nb\tc\x07\x85\ud800") == "a␊b␉c␇\ufffd?"
    assert visible("a\nb", lines=True) == "a\nb"


def test_no_candidate_one_candidate_and_one_document() -> None:
    _, parsed = page(make_comparison())
    assert "was compared with nothing" in parsed.said
    alone = make_candidate("m")
    unsure = alone.model_copy(
        update={
            "total": make_change("total", 0.01, low=None, high=None, kl_low=None, kl_high=None),
            "subsets": (make_change(SUBSETS[0], 0.01, low=None, high=None), make_change(SUBSETS[1], 0.0)),
        }
    )
    _, parsed = page(make_comparison(unsure))
    assert "one document gives no interval" in parsed.said and "? needs more text" in parsed.said


def test_saved_evaluations_have_no_divergence() -> None:
    """Where only losses were compared, everything else says what it can."""
    html, parsed = page(make_comparison(make_candidate("m-a", full=False), make_candidate("m-b", 0.0, full=False)))
    assert len(re.findall("<svg", html)) == 1 + 2 and "KL divergence, mean" not in parsed.said
    assert "saved evaluations have no KL" in parsed.said and percent_change(make_change("total")) in parsed.said
    text = markdown_report(make_comparison(make_candidate("m-a", full=False)))
    assert "Δ perplexity | m-a" in text


@pytest.mark.parametrize("nats", [0.0, 1e-9, -0.3, 5.0, 900.0])
def test_extreme_changes(nats: float) -> None:
    result = make_comparison(make_candidate("m-a", nats), make_candidate("m-b", 0.001, bytes_on_disk=None))
    _, parsed = page(result)
    assert percent_change(result.candidates[0].total) in parsed.said


def test_many_candidates_and_long_names() -> None:
    names = [f"gpt-neo-1.3B-{'x' * 40}-{number}" for number in range(8)]
    sizes = [500_000_000 + 1000 * number for number in range(8)]
    html, parsed = page(
        make_comparison(*(make_candidate(n, 0.01, bytes_on_disk=s) for n, s in zip(names, sizes, strict=True)))
    )
    assert all(name in parsed.said for name in names) and "…" in html


def test_names_keep_off_marks_of_others() -> None:
    """Whichever side of the point they stand on."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    for beside in ((0.62, 0.5), (0.38, 0.5), (0.62, 0.54), (0.5, 0.58)):
        with drawing(380, "key", "title") as (axes, _):
            name_points(axes, [Point("trellis", 0.5, 0.5, None, None, False)], [beside])
            figure = axes.get_figure(root=True)
            assert figure is not None
            (label,) = axes.texts
            assert isinstance(label, Text)
            box = label.get_window_extent(FigureCanvasAgg(figure).get_renderer())
            x, y = axes.transData.transform(beside)
            assert not (box.x0 - 3 < x < box.x1 + 3 and box.y0 - 3 < y < box.y1 + 3), beside


@pytest.mark.parametrize(
    ("low", "high", "state"),
    [
        (0.0, 0.0099, State.PASSES),
        (-0.5, -0.1, State.PASSES),
        (0.0, 0.01, State.NEEDS_MORE_TEXT),
        (0.0099, 0.5, State.NEEDS_MORE_TEXT),
        (0.01, 0.02, State.FAILS),
        (0.0607, 0.0673, State.FAILS),
        (None, None, State.NEEDS_MORE_TEXT),
    ],
)
def test_the_whole_interval_decides(low: float | None, high: float | None, state: State) -> None:
    assert state_of(low, high, 0.01) is state


@pytest.mark.parametrize("low", [-0.01, 0.0, 0.005, 0.00995, 0.00996, 0.05])
@pytest.mark.parametrize("width", [0.0, 0.004, 0.1])
@pytest.mark.parametrize("kl", [None, (0.0, 0.005), (0.005, 0.02), (0.02, 0.03)])
def test_a_verdict_is_the_worst_of_both_bounds(low: float, width: float, kl: tuple[float, float] | None) -> None:
    """Against the definition: passes if every value inside both intervals is below the bounds, fails if none is."""
    below = [bound > math.expm1(end) for bound, end in ((0.01, low), (0.01, low + width))]
    expected = [State.PASSES if all(below) else State.NEEDS_MORE_TEXT if any(below) else State.FAILS]
    ends: dict[str, Any] = {"kl": None, "kl_low": None, "kl_high": None}
    if kl is not None:
        ends = {"kl": sum(kl) / 2, "kl_low": kl[0], "kl_high": kl[1]}
        inside = [end < 0.01 for end in kl]
        expected.append(State.PASSES if all(inside) else State.NEEDS_MORE_TEXT if any(inside) else State.FAILS)
    change = make_change("total", low + width / 2, low=low, high=low + width, **ends)
    order = [State.PASSES, State.NEEDS_MORE_TEXT, State.FAILS]
    assert verdict_of(change).state is max(expected, key=order.index)


def test_the_verdict_names_the_smallest_that_passes() -> None:
    small_bad = make_candidate("b-2bit", 0.3, bytes_on_disk=1)
    unsure = make_candidate("b-3bit", 0.008, bytes_on_disk=2)  # up to 0.011
    good = make_candidate("b-4bit", 0.004, bytes_on_disk=300_000_000)
    better = make_candidate("b-8bit", 0.0001, bytes_on_disk=900_000_000)
    assert recommended(make_comparison(small_bad, unsure, good, better)) is good
    assert verdict(make_comparison(small_bad, unsure, good, better)) == (
        "b-4bit is the smallest of 2 models that pass. Perplexity +0.40 % (95 % interval +0.20 to +0.70 %, bound 1 %: "
        "passes); KL 0.00065 [0.00060, 0.00071] nats a token (bound 0.01: passes); "
        "300.0 MB instead of 2,631.0 MB (11 %)."
    )
    assert headline(make_comparison(small_bad, unsure, good)) == "Only b-4bit passes."
    assert headline(make_comparison(small_bad, unsure)) == "None of 2 models passes yet; b-3bit is closest."
    assert headline(make_comparison(small_bad, small_bad)) == "None of 2 models passes; b-2bit is closest."
    assert headline(make_comparison(small_bad)) == "b-2bit fails."
    assert headline(make_comparison(unsure)) == "b-3bit needs more text."
    assert headline(make_comparison(good)) == "b-4bit passes."


def diverging(name: str, megabytes: float, kl: float | None, *, width: float | None = 0.0, nats: float = 0.0) -> Any:
    """A candidate whose perplexity changes by `nats` on the text, give or take 0.002, and KL give or take `width`."""
    candidate = make_candidate(name, nats, bytes_on_disk=round(megabytes * 1e6))
    ends = (None, None) if kl is None or width is None else (kl - width, kl + width)
    change = make_change("total", nats, low=nats - 0.002, high=nats + 0.002, kl=kl, kl_low=ends[0], kl_high=ends[1])
    return candidate.model_copy(update={"total": change})


@pytest.mark.parametrize(
    ("kl", "width", "good"),
    [(0.0099, 0.0, True), (0.0101, 0.0, False), (0.009, 0.0011, False), (0.001, None, False), (None, None, True)],
)
def test_perplexity_alone_does_not_recommend(kl: float | None, width: float | None, good: bool) -> None:
    """Predictions that moved too far, or not surely little, are refused however perplexity came out."""
    far, near = diverging("far", 100, kl, width=width), diverging("near", 200, 0.001)
    assert recommended(make_comparison(far, near)) is (far if good else near)


def test_what_comes_closest_is_near_in_both() -> None:
    result = make_comparison(diverging("blind", 100, 0.3), diverging("seen", 100, 0.04, nats=0.03))
    assert recommended(result) is None and "; seen is closest." in headline(result)


def test_remarks() -> None:
    def said(*candidates: Any) -> str:
        result = make_comparison(*candidates)
        text = " ".join(remarks(result))
        assert text in markdown_report(result)
        return text

    tiny, costly = diverging("b-int8", 900, 3e-6), diverging("b-2bit", 90, 0.05, nats=0.05)
    assert said(tiny, costly) == ""  # nobody notices the one, perplexity shows the other
    blind = said(diverging("b-2bit", 300, 0.004), diverging("b-3bit", 310, 0.003), tiny)
    assert blind == (
        "Perplexity shows little on this text: the predictions of 2 models changed (KL 0.00300 to 0.00400), but the "
        "interval of the change of perplexity includes zero. Judge by KL and by the same top token."
    )
    assert ": b-2bit’s predictions changed (KL 0.00400), but" in said(diverging("b-2bit", 300, 0.004), tiny)
    three = diverging("b-2bit", 300, 0.004), diverging("b-3bit", 330, 0.002), diverging("b-4bit", 331, 0.0001)
    closer = said(*three)
    assert closer.endswith("For 30.0 MB more, b-3bit stays closer: KL 0.00200 instead of 0.00400.")
    shown = page(make_comparison(*three))[1].said
    assert closer in shown.replace("\u00a0", " ") and "dashed" not in shown
    assert "Where KL was not measured" in said(diverging("b-2bit", 300, None, width=None), tiny)


def test_the_bounds_are_drawn_where_they_are_in_sight() -> None:
    wide = make_comparison(diverging("a", 300, 0.0001), diverging("b", 310, 0.2, nats=0.2))
    said = page(wide)[1].said
    assert "bound, 0.01 nats." in said and "bound, 1 %." in said


def test_the_heat_maps_are_anchored_to_the_bound() -> None:
    """The same figure has the same ground beside whatever else; what reaches the bound is marked, by more than hue."""
    far, near = diverging("a", 300, 0.02), diverging("b", 310, 0.005)
    grounds = []
    for candidates in ((near,), (far, near), (diverging("c", 5, 5.0), near)):
        html, _ = page(make_comparison(*candidates))
        totals = html.split('<tr class="total">')[1].split("</tr>")[0]
        grounds.append(re.findall(r'<td( class="over")? style="--h:([\d.]+)"[^>]*>([\d.]+)', totals))
    assert [row[-1] for row in grounds] == [("", "0.35", "0.00500")] * 3
    assert grounds[1][0] == (' class="over"', "0.65", "0.02000") and grounds[2][0][:2] == (' class="over"', "1.00")


def test_subsets_of_few_documents_are_marked() -> None:
    result = make_comparison(make_candidate("a"))
    scores = tuple(
        score.model_copy(update={"documents": n}) for score, n in zip(result.reference.subsets, (2, 3), strict=True)
    )
    result = result.model_copy(update={"reference": result.reference.model_copy(update={"subsets": scores})})
    said = page(result)[1].said
    assert f"{SUBSETS[0]} †" in said and f"{SUBSETS[1]} †" not in said and "fewer than three documents" in said
    assert f"{SUBSETS[0]} †" in markdown_report(result)
    assert "fewer than three documents:" not in page(make_comparison(make_candidate("a")))[1].said


def make_speed(*programs: tuple[str, str, float]) -> Speed:
    """Tool, label and tokens a second of each program."""
    made = []
    for tool, label, rate in programs:
        run = Run(
            import_s=1, load_s=2, prefill_s=3, prefill_tokens_per_s=4, decode_tokens_per_s=rate, peak_rss_bytes=7e8
        )
        source = label.partition(": ")[2].partition(",")[0]
        made.append(Program(label=label, tool=tool, source=source, versions={}, runs=[run], median=run))
    return Speed(prompt_tokens=8, new_tokens=9, repeats=1, threads=2, dtype="float32", programs=made, notes=[])


def test_speed_stands_beside_loss(tmp_path: Path) -> None:
    """neoquant's own runs, found by the model's name; other programs and models without a run have none."""
    files = {name: tmp_path / f"{name}.json" for name in ("cost", "bench", "older", "twice", "other")}
    result = make_comparison(make_candidate("n-nf4", 0.004), make_candidate("n-nf4 (int8 activations)"), base="n")
    files["cost"].write_text(result.to_json())
    ours = make_speed(
        ("neoquant", "neoquant: n", 10), ("neoquant", "neoquant: n-nf4", 25.0),
        ("neoquant", "neoquant: n-nf4, int8 activations", 30), ("transformers", "transformers: n", 5),
    )  # fmt: skip
    files["bench"].write_text(ours.to_json())
    found = gather([files["cost"], files["bench"]])
    assert [found.speed.decode(name) for name in ("n", "n-nf4", "n-nf4 (int8 activations)", "x")] == [
        "10.0", "25.0", "30.0", "-"
    ]  # fmt: skip
    said = Parsed(render_page(found)).said.replace("\u00a0", " ")
    assert "25.0 tokens/s" in said and "2.5 times n’s; 700.0 MB of memory" in said and "8 prompt tokens" in said
    assert "| 25.0 | 700.0 MB |" in markdown_report(found.comparison, found.speed)
    older = json.loads(ours.to_json())
    del older["schema_version"]
    files["older"].write_text(json.dumps(older))
    assert gather([files["cost"], files["older"]]).speed == found.speed
    with pytest.raises(RequestError, match=r"n is in both .*bench.json and .*older.json"):
        gather(list(files.values())[:3])
    other = make_speed(("neoquant", "neoquant: x", 1)).model_copy(update={"threads": 3})
    files["other"].write_text(other.to_json())
    with pytest.raises(RequestError, match=r"other.json cannot stand beside .*bench.json: .*3 threads.*, not .*2 thr"):
        gather([files["cost"], files["bench"], files["other"]])


def test_percentages() -> None:
    assert percent_change(make_change("x", math.log(1.0068))) == "+0.68 %"
    assert percent_change(make_change("x", math.log(0.8))) == "−20.0 %"
    assert percent_change(make_change("x", 1e-9)) == "0.00 %"
    assert percent_change(make_change("x", math.log(13.5))) == "+1,250 %"


def test_short_names() -> None:
    def short(*names: str) -> list[str]:
        return list(short_names(make_comparison(*map(make_candidate, names), base="neo")).values())

    assert short("neo-nf4", "neo-int8", "other") == ["nf4", "int8", "other"]
    assert short("neo", "neo-nf4") == ["neo", "neo-nf4"]  # nothing would be left of the first
    assert short("neo-a", "neo_a") == ["neo-a", "neo_a"]


def test_gathering(tmp_path: Path) -> None:
    def saved(name: str, result: Comparison | Inspection) -> Path:
        path = tmp_path / name
        path.write_text(result.to_json(), "utf-8")
        return path

    one, two = make_comparison(make_candidate("a")), make_comparison(make_candidate("b"), make_candidate("c"))
    first, second, layers = saved("1.json", one), saved("2.json", two), saved("l.json", make_inspection("a"))
    found = gather([first, layers, second])
    assert [c.evaluation.model.name for c in found.comparison.candidates] == ["a", "b", "c"]
    assert found.comparison.reference == one.reference and found.inspections[0].model.name == "a"

    with pytest.raises(RequestError, match=r"a is in both .*1.json and .*again.json"):
        gather([first, saved("again.json", one)])
    with pytest.raises(RequestError, match=r"l.json: no comparison"):
        gather([layers])
    reference = one.reference
    for change, what in (
        (
            {"data": reference.data.model_copy(update={"sha256": "e" * 64})},
            "the documents: eeeeeeeeeeee and abababababab",
        ),
        ({"suite": reference.suite.model_copy(update={"context": 512})}, "the context: 512 and 2048"),
        ({"suite": reference.suite.model_copy(update={"protocol": "joined"})}, "the protocol: joined and rolling"),
        ({"model": reference.model.model_copy(update={"sha256": "0" * 64})}, "the base's weights: 000000000000 and "),
        ({"environment": reference.environment.model_copy(update={"dtype": "float16"})}, "the computing type: float16"),
    ):
        other = two.model_copy(update={"reference": reference.model_copy(update=change)})
        with pytest.raises(RequestError, match=rf"other.json cannot stand beside .*1.json: {re.escape(what)}"):
            gather([first, saved("other.json", other)])
    with pytest.raises(RequestError, match="the base's weights"):
        gather([first, saved("foreign.json", make_inspection("a", base="another"))])
    alone = tmp_path / "alone.json"
    alone.write_text(make_evaluation("a").to_json(), "utf-8")
    with pytest.raises(DataError, match="evaluation of one model"):
        gather([alone])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not a result of neoquant: no JSON object"),
        ("[1]", "is not a result of neoquant"),
        ('{"schema_version": "theirs/1"}', "its schema_version is 'theirs/1'"),
        ('{"schema_version": "neoquant.comparison/0"}', "not a saved comparison of this version"),
    ],
)
def test_what_is_no_result(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError, match=re.escape(says)) as caught:
        gather([path])
    assert "x.json" in str(caught.value)
    with pytest.raises(DataError, match=r"nowhere.json: there is no such file"):
        gather([tmp_path / "nowhere.json"])


def test_markdown() -> None:
    result = make_comparison(make_candidate("neo|x", 0.004), make_candidate("neo-int8", 0.5))
    text = markdown_report(result)
    assert "| **neo\\|x** | 838.1 MB | 4.127, 5.100 |" in text and "+0.40 % [+0.20 to +0.70 %]" in text
    assert "| passes |" in text and "| fails |" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in tables[:5]} == {10}
    assert {line.replace("\\|", "").count("|") for line in tables[5:]} == {4}
    assert "| total | 0.00065 | 0.00065 |" in text and "sha256 abababababab" in text


def test_the_cards_block_is_replaced_and_nothing_else() -> None:
    candidate = make_candidate("a")
    block = measured_block(make_comparison(candidate), candidate)
    assert "| total | 11.359 → 11.498 |" in block
    for card in (
        "# a\n\n## Measured\n\nNot measured yet: run it\n",
        "# a\n\n## Measured\nold\n\n## Licence\n\nfree\n",
        "# a\n",
        "",
    ):
        once = with_measured(card, block)
        assert block in once and once.count("## Measured") == 1 and "old" not in once and "Not measured" not in once
        assert with_measured(once, block) == once and once.startswith(card[:3])
        assert "other" in with_measured(once, "other") and block not in with_measured(once, "other")
        assert ("## Licence\n\nfree\n" in once) == ("Licence" in card)
    assert with_measured("x", r"\1 \g<0>").count(r"\1 \g<0>") == 1


def test_one_comparison_of_a_sweep_is_its_page() -> None:
    result = make_comparison(make_candidate("m-a"))
    assert sweep_pages([result]) == {"report.html": page(result)[0]}


def test_several_comparisons_of_a_sweep_have_an_index() -> None:
    bases = (("m", 0.001), (f"x{HOSTILE}", 0.5))
    results = [make_comparison(make_candidate("m-a", nats), base=base) for base, nats in bases]
    made = sweep_pages(results)
    paths = [page_path(result) for result in results]
    assert list(made) == [*paths, "report.html"] and paths[0] == "results/m-pile-core.html"
    index = Parsed(made["report.html"])
    assert index.targets[0] == paths[0] and "script" not in index.tags
    for result in results:
        assert headline(result) in index.said
    table = sweep_table(results)
    assert [line.count("|") for line in table.splitlines() if "script" not in line] == [11] * 5
    assert "| passes |" in table and "| fails |" in table
