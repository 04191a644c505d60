"""Contestants take turns, so that what the machine does meanwhile meets all of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)
Timed = Callable[[], dict[str, float]]
"""One turn: what was measured -> a figure."""


def medians_in_turn(contestants: Mapping[Name, Timed], repeats: int) -> dict[Name, dict[str, float]]:
    """Of each figure, over so many rounds; one before them warms up."""
    found: dict[Name, dict[str, list[float]]] = {name: {} for name in contestants}
    for number in range(repeats + 1):
        for name, timed in contestants.items():
            for what, figure in timed().items():
                found[name].setdefault(what, []).extend([figure] if number else [])
        print(f"round {number} of {repeats}", flush=True)
    return {name: {what: round(statistics.median(all_), 2) for what, all_ in of.items()} for name, of in found.items()}
