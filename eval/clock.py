"""The time of a script that must end: shared out among its parts, whatever the machine."""

from __future__ import annotations

import time
from collections.abc import Mapping


class Clock:
    """`seconds` in all, for parts as large as `shares` says; what one leaves is for those that are begun after it."""

    def __init__(self, seconds: float, shares: Mapping[str, float]) -> None:
        self.seconds, self._shares = seconds, dict(shares)
        self._end = self._until = time.perf_counter() + seconds

    def left(self) -> float:
        """Seconds; less than 0 where the time is over."""
        return self._end - time.perf_counter()

    def begin(self, part: str) -> float:
        """How many seconds a part has, from now on."""
        share = self._shares[part] / sum(self._shares.values())
        del self._shares[part]
        given = max(0.0, self.left()) * share
        self._until = time.perf_counter() + given
        return given

    def is_over(self) -> bool:
        """Whether the part that was begun last has had its time."""
        return time.perf_counter() > self._until
