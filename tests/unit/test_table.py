"""Tables: every figure whole at 80 columns, side by side where there is room."""

from __future__ import annotations

import io

import pytest
from results import make_inspection
from rich.cells import cell_len
from rich.console import Console, RenderableType

from neoquant.benchmark.run import Program, Run, Speed
from neoquant.data.suite import Suite
from neoquant.evaluation.result import (
    Candidate,
    Change,
    Comparison,
    DataInfo,
    Environment,
    Evaluation,
    Macro,
    MacroChange,
    ModelInfo,
    Resampling,
    Score,
)
from neoquant.report.benchmark import speed_table
from neoquant.report.calibration import calibration_table
from neoquant.report.layers import inspection_table
from neoquant.report.split_table import Column, SplitTable
from neoquant.report.table import comparison_table, evaluation_table

SUBSETS = ("Gutenberg (PG-19)", "ArXiv")


def evaluation(name: str, nats: float) -> Evaluation:
    scores = [Score(subset=s, documents=10, tokens=1_234_567, bytes=5_234_567, nats=nats) for s in (*SUBSETS, "total")]
    return Evaluation(
        model=ModelInfo(name=name, bytes_on_disk=838_100_000, bits_per_weight_linears=4.127, bits_per_weight_model=5.1),
        suite=Suite(name="pile-core", context=2048, data={"kind": "file", "path": "x"}),
        data=DataInfo(source="x", revision=None, sha256="ab" * 32, tokenizer_sha256="cd"),
        environment=Environment(
            neoquant="0.1", torch="2", python="3", platform="Linux", device="cpu", dtype="float32", threads=2
        ),
        total=scores[-1],
        macro=Macro(nats_per_token=nats / 1_234_567, bits_per_byte=0.8),
        subsets=tuple(scores[:-1]),
        units=(),
        seconds=12.3,
        created="2026-01-01T00:00:00+00:00",
    )


def comparison() -> Comparison:
    changes = [
        Change(
            subset=subset,
            nats_per_token=0.0123,
            low=low,
            high=high,
            bits_per_byte=0.004,
            bits_per_byte_low=None,
            bits_per_byte_high=None,
            agreement=0.968,
            agreement_low=0.9656,
            agreement_high=0.9704,
            kl=0.00065,
            kl_low=0.0006,
            kl_high=0.00071,
        )
        for subset, low, high in ((SUBSETS[0], 0.01, 0.0145), (SUBSETS[1], None, None), ("total", -0.01, 0.03))
    ]
    other = evaluation("gpt-neo-1.3B-nf4", 3_015_000)
    fields = changes[-1].model_dump(include=MacroChange.model_fields.keys())
    macro = MacroChange(**fields)
    candidate = Candidate(evaluation=other, total=changes[-1], macro=macro, subsets=tuple(changes[:-1]))
    reference = evaluation("gpt-neo-1.3B", 3_000_000)
    return Comparison(reference=reference, candidates=(candidate,), resampling=Resampling(unit="document"))


def render(renderable: RenderableType, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert all(cell_len(line) <= width for line in text.splitlines())
    return text


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_evaluation(width: int) -> None:
    text = render(evaluation_table(evaluation("gpt-neo-1.3B", 3_000_000)), width)
    for whole in ("Gutenberg", "bits/byte", "1,234,567", "5,234,567", "11.359", "0.8268", "2.4300"):
        assert whole in text
    assert "…" not in text
    assert width == 40 or len(text.splitlines()) == 6


@pytest.mark.parametrize("width", [40, 80, 120, 220])
def test_comparison(width: int) -> None:
    text = render(comparison_table(comparison()), width)
    for whole in ("11.359 → 11.498", "+0.0123 [+0.0100, +0.0145]", "+0.0123 [-]", "96.80 [96.56, 97.04] %"):
        assert whole in text
    for whole in ("0.00065 [0.00060, 0.00071]", "838.1 MB", "4.127", "0.8310"):
        assert whole in text
    assert "interval over documents" in " ".join(text.split())
    assert "…" not in text
    assert text.count("Gutenberg") == {40: 5, 80: 2, 120: 2, 220: 1}[width]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_other_tables(width: int) -> None:
    """Every heading and every figure, however narrow the terminal is."""
    layers = {f"transformer.h.0.{n}": {"error": 0.01, "error_nearest": 0.02} for n in ("q_proj", "mlp.c_fc")}
    inspection = make_inspection("nf4")
    speed = Run(import_s=1, load_s=2, prefill_s=3, prefill_tokens_per_s=4, decode_tokens_per_s=5, peak_rss_bytes=7e8)
    program = Program(label="neoquant: a-model", tool="neoquant", source="", versions={}, runs=[], median=speed)
    measured = Speed(
        prompt_tokens=1, new_tokens=9, repeats=1, threads=1, dtype="float32", programs=[program] * 2, notes=[]
    )
    texts = [
        render(table, width)
        for table in (calibration_table(layers), inspection_table(inspection), speed_table(measured))
    ]
    for text, found in zip(
        texts,
        (("RTN %", "2.00", "0.50", "c_fc"), ("q_proj", "1.23", "0.00321", "h.1.q_proj"), ("4.0", "700.0 MB", "1.00")),
        strict=True,
    ):
        assert all(part in text for part in found), text
        assert "…" not in text
    assert "1 thread;" in texts[2] and "medians of 1 run" in " ".join(texts[2].split())


def test_names_are_text_and_not_markup() -> None:
    odd = evaluation("[red]model", 1)
    assert "[red]model" in render(evaluation_table(odd), 80)
    assert render(comparison_table(comparison().model_copy(update={"reference": odd})), 200).count("[red]model") == 2


def test_long_names_are_folded_and_figures_stay_whole() -> None:
    named = comparison().model_copy(update={"reference": evaluation("long-" * 12, 3_000_000)})
    text = render(comparison_table(named), 80)
    assert "…" not in text and "11.359" in text and "0.8268" in text and "0.00065 [0.00060, 0.00071]" in text
    assert "long-" * 12 in "".join(line.split(" ")[0] for line in text.splitlines()[1:] if "long" in line[:26])


@pytest.mark.parametrize("width", [30, 40, 80])
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("\x1b]0;title\x07\u202e" + "subset " * 9, r"\x1b]0;title\x07\u202e" + "subset" * 9),
        ("\r\n\t\x07\x08\u2028", r"\r\n\t\x07\x08\u2028"),
        ("\x1b[2J" * 30, r"\x1b[2J" * 30),
        ("日本語" * 20, "日本語" * 20),
        ("e\u0301" * 70, "e\u0301" * 70),
        ("\ud800" * 20, r"\ud800" * 20),
        ("", ""),
    ],
)
def test_names_of_any_characters_are_whole_and_keep_to_their_column(name: str, shown: str, width: int) -> None:
    """Escaped before they are cut: nothing of them is lost, and figures stand where their heading does."""
    lines = render(SplitTable("row", [name, "b"], [Column("one", ["11", "22"])]), width).splitlines()
    end = cell_len(lines[0].rstrip())
    figures = [line.rstrip()[-2:] for line in lines if cell_len(line.rstrip()) == end]
    assert figures == ["ne", "11", "22"]
    names = [line[: -len("11 ")] if line.rstrip().endswith("11") else line for line in lines[1:-1]]
    assert "".join("".join(names).split()) == shown
    assert not any(line.startswith("\u0301") for line in lines)


def test_columns_that_fit_stay_together() -> None:
    table = SplitTable("row", ["a", "b"], [Column("one", ["1", "2"]), Column("two", ["3", "4"])])
    assert render(table, 80).splitlines()[0].split() == ["row", "one", "two"]
    assert [line.split()[1:] for line in render(table, 13).splitlines()] == [["one", "two"], ["1", "3"], ["2", "4"]]
    split = render(table, 9).splitlines()
    assert [line.split() for line in split] == [
        ["row", "one"],
        ["a", "1"],
        ["b", "2"],
        ["row", "two"],
        ["a", "3"],
        ["b", "4"],
    ]
