"""Tables: every figure whole at 80 columns, side by side where there is room."""

from __future__ import annotations

import io

import pytest
from rich.console import Console, RenderableType

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
            agreement_error=0.0012,
            kl=0.00065,
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
    assert all(len(line) <= width for line in text.splitlines())
    return text


@pytest.mark.parametrize("width", [80, 120, 200])
def test_evaluation(width: int) -> None:
    text = render(evaluation_table(evaluation("gpt-neo-1.3B", 3_000_000)), width)
    for whole in ("Gutenberg (PG-19)", "bits/byte", "1,234,567", "5,234,567", "11.359", "0.8268", "2.4300"):
        assert whole in text
    assert "…" not in text
    assert len(text.splitlines()) == 6


@pytest.mark.parametrize("width", [80, 120, 200])
def test_comparison(width: int) -> None:
    text = render(comparison_table(comparison()), width)
    for whole in ("11.359 → 11.498", "+0.0123 [+0.0100, +0.0145]", "+0.0123 [-]", "96.80 ± 0.12 %", "0.00065"):
        assert whole in text
    for whole in ("838.1", "4.127", "0.8310", "interval over documents"):
        assert whole in text
    assert "…" not in text
    assert text.count("Gutenberg (PG-19)") == (2 if width == 80 else 1)


def test_names_are_text_and_not_markup() -> None:
    odd = evaluation("[red]model", 1)
    assert "[red]model" in render(evaluation_table(odd), 80)
    assert render(comparison_table(comparison().model_copy(update={"reference": odd})), 80).count("[red]model") == 2


def test_long_names_give_way_to_figures() -> None:
    text = render(comparison_table(comparison().model_copy(update={"reference": evaluation("x" * 60, 3_000_000)})), 80)
    assert "…" in text and "11.359     0.8268" in text
