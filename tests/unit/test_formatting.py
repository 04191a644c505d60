"""Numbers in words that people use."""

from __future__ import annotations

import pytest

from neoquant.errors import NeoquantError
from neoquant.report.formatting import divergence, duration, signed
from neoquant.sizes import plural, size


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (999, "999 bytes"),
        (1000, "1.0 KB"),
        (999_940, "999.9 KB"),
        (999_960, "1.0 MB"),
        (838_100_000, "838.1 MB"),
        (2_631_000_000, "2,631.0 MB"),
        (10_500_000_000, "10.5 GB"),
        (65_536_000_000_000, "65.5 TB"),
        (3e15, "3.0 PB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0 seconds"),
        (0.4, "0.4 seconds"),
        (1, "1 second"),
        (12.3, "12 seconds"),
        (100, "100 seconds"),
        (120, "2 minutes"),
        (150, "2.5 minutes"),
        (4 * 3600, "4 hours"),
        (4_320_000, "50 days"),
        (86400 * 365 * 20_000, "20,000 years"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_plurals_and_signs() -> None:
    assert [plural(n, "document") for n in (0, 1, 2345)] == ["0 documents", "1 document", "2,345 documents"]
    assert [signed(v, 2) for v in (0.001, -0.5, 1234.5)] == ["0.00", "−0.50", "+1,234.50"]
    assert [divergence(v) for v in (None, 0.0, 3e-6, 0.00065)] == ["-", "0.00000", "3.0e-06", "0.00065"]


@pytest.mark.parametrize(
    ("message", "places", "text"),
    [
        ("no such file", ["a/t.txt"], "a/t.txt: no such file"),
        ("no such file", ["a/t.txt", "a/t.txt"], "a/t.txt: no such file"),
        ("t.txt is UTF-16", ["a/t.txt"], "a/t.txt is UTF-16"),
        ("t.txt: is UTF-16", ["a/t.txt", "b"], "b: a/t.txt: is UTF-16"),
        ("t.txt2 is UTF-16", ["t.txt"], "t.txt: t.txt2 is UTF-16"),
        ("bad", ["line 1", "line 1 of x"], "line 1 of x: line 1: bad"),
    ],
)
def test_errors_name_a_place_once(message: str, places: list[str], text: str) -> None:
    error = NeoquantError(message)
    error.places = places
    assert str(error) == text
