"""Which subsets are too small for their figures to be trusted."""

from __future__ import annotations

from collections import Counter

from neoquant.evaluation.result import Evaluation

FEW = 3
"""With fewer documents than this, an interval says little: it cannot know how documents differ."""

FEW_MARK = "†"
FEW_NOTE = f"{FEW_MARK} fewer than three documents: add documents before relying on these figures"


def has_few_documents(result: Evaluation) -> list[bool]:
    """For each subset, then the total, whether it has fewer than FEW documents (windows, where these are the unit)."""
    counted = Counter(unit.subset for unit in result.units if unit.tokens)
    if counted:
        return [*(counted[score.subset] < FEW for score in result.subsets), sum(counted.values()) < FEW]
    return [score.documents < FEW for score in (*result.subsets, result.total)]


def subset_names(result: Evaluation) -> tuple[list[str], bool]:
    """The names of the subsets and of the total, those with few documents marked; and whether any is."""
    few = has_few_documents(result)
    scores = (*result.subsets, result.total)
    return [f"{s.subset} {FEW_MARK}" if mark else s.subset for s, mark in zip(scores, few, strict=True)], any(few)
