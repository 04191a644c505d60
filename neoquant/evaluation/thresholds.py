"""Conditions on results, for scripts that must stop when a model lost too much: `delta_nll > 0.05`."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import NamedTuple

from neoquant.errors import RequestError
from neoquant.evaluation.result import Candidate, Change, Comparison, Evaluation, Score

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_SCORES: dict[str, Callable[[Score], float | None]] = {
    "nll": lambda score: score.nats_per_token,
    "perplexity": lambda score: score.perplexity,
    "bits_per_byte": lambda score: score.bits_per_byte,
}
_CHANGES: dict[str, Callable[[Change], float | None]] = {
    "delta_nll": lambda change: change.nats_per_token,
    "delta_nll_low": lambda change: change.low,
    "delta_nll_high": lambda change: change.high,
    "delta_bits_per_byte": lambda change: change.bits_per_byte,
    "perplexity_ratio": lambda change: change.perplexity_ratio,
    "agreement": lambda change: change.agreement,
    "kl": lambda change: change.kl,
    "kl_median": lambda change: change.divergence.quantiles["50"] if change.divergence else None,
    "kl_99": lambda change: change.divergence.quantiles["99"] if change.divergence else None,
    "kl_99.9": lambda change: change.divergence.quantiles["99.9"] if change.divergence else None,
    "kl_max": lambda change: change.divergence.maximum if change.divergence else None,
    "probability_rms": lambda change: change.probability_change.rms if change.probability_change else None,
}

FIELDS = (*_SCORES, *_CHANGES)
"""What a condition may name; all but `nll`, `perplexity` and `bits_per_byte` need a comparison."""

ANY = "any:"
"""Before a field: the condition holds for some subset. Without it, it is of the total."""


class Condition(NamedTuple):
    """`field` `symbol` `limit`, of the total or of any subset."""

    field: str
    symbol: str
    limit: float
    any_subset: bool

    def __str__(self) -> str:
        return f"{ANY if self.any_subset else ''}{self.field} {self.symbol} {self.limit:g}"

    def found(self, evaluation: Evaluation, candidate: Candidate | None = None) -> list[str]:
        """Where it holds, a line each with the value. Raises RequestError where the result has no such figure."""
        if self.field in _SCORES:
            scores = evaluation.subsets if self.any_subset else (evaluation.total,)
            values = [(score.subset, _SCORES[self.field](score)) for score in scores]
        else:
            if candidate is None:
                raise RequestError(f"{self} is a comparison's: one model alone has {', '.join(_SCORES)}")
            changes = candidate.subsets if self.any_subset else (candidate.total,)
            values = [(change.subset, _CHANGES[self.field](change)) for change in changes]
        lines = []
        for subset, value in values:
            if value is None:
                raise RequestError(f"{self}: this result has no {self.field} of {subset}")
            if OPERATORS[self.symbol](value, self.limit):
                lines.append(
                    f"{evaluation.model.name}, {subset}: {self.field} {value:.6g} {self.symbol} {self.limit:g}"
                )
        return lines


def split_condition(text: str, name: str) -> tuple[str, str, float, bool] | None:
    """What is compared, which the regular expression `name` matches, how, with which number, and whether any will do;
    None for what is not written like that."""
    match = re.fullmatch(rf"\s*({ANY})?\s*({name})\s*(>=|<=|>|<)\s*(\S+)\s*", text)
    try:
        if match and not math.isnan(limit := float(match[4])):
            return match[2], match[3], limit, match[1] is not None
    except ValueError:
        pass
    return None


def parse(text: str) -> Condition:
    """Raises RequestError for what is not a condition, with what would be one."""
    parts = split_condition(text, r"[\w.]+")
    if parts is not None and parts[0] in FIELDS:
        return Condition(*parts)
    raise RequestError(
        f"--fail-if {text!r}: write it like 'delta_nll > 0.05' or '{ANY}kl >= 0.1', with one of {', '.join(FIELDS)}"
    )


def require_scores(conditions: list[Condition]) -> None:
    """Raise RequestError for a condition that only a comparison can meet: what is measured is one model alone."""
    for condition in conditions:
        if condition.field not in _SCORES:
            raise RequestError(
                f"--fail-if {str(condition)!r}: {condition.field} needs a comparison; one model alone has "
                f"{', '.join(_SCORES)}"
            )


def failures(conditions: list[Condition], result: Evaluation | Comparison) -> list[str]:
    """Every condition that holds for a model, a line each; of a comparison, for a candidate."""
    if isinstance(result, Evaluation):
        return [line for condition in conditions for line in condition.found(result)]
    pairs = [(candidate.evaluation, candidate) for candidate in result.candidates]
    return [line for condition in conditions for pair in pairs for line in condition.found(*pair)]
