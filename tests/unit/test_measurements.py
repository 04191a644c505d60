"""What the published comparison with other tools rests on: the split of the text, and ratios over several seeds."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

from neoquant.data.documents import Document


def script(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "eval")
        patch.syspath_prepend(REPOSITORY / "eval" / "quality")
        return importlib.import_module(name)


@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=30), st.integers(0, 5))
def test_no_document_is_calibrated_on_and_scored(subsets: list[str], seed: int) -> None:
    documents = [Document(f"line {number}", subset, "text") for number, subset in enumerate(subsets)]
    shown, scored = script("texts").split(documents, seed)
    assert sorted([*shown, *scored], key=documents.index) == documents and not set(shown) & set(scored)
    for subset in set(subsets):
        assert sum(d.subset == subset for d in shown) == subsets.count(subset) // 2
    assert script("texts").split(documents, seed) == (shown, scored)


def test_seeds_split_differently() -> None:
    documents = [Document(f"line {number}", "a", "text") for number in range(20)]
    assert len({tuple(script("texts").split(documents, seed)[0]) for seed in range(5)}) == 5


def test_a_ratio_counts_a_document_of_several_seeds_once() -> None:
    feedback = script("feedback")
    ours, theirs = "ours", "theirs"  # stand for candidates
    scored = [
        {"documents": ["x", "y"], "tokens": [10, 20], "reference_nats": [1.0, 2.0]},
        {"documents": ["y", "z"], "tokens": [20, 30], "reference_nats": [2.0, 2.25]},
    ]
    kl = {ours: [[1.0, 2.0], [3.0, 4.0]], theirs: [[2.0, 4.0], [6.0, 8.0]]}
    seeds = [
        {
            "scored": part,
            "rows": {name: {"kl": kl[name][number], "nats": [1.5, 2.5], "agreed": [9, 18]} for name in kl},
        }
        for number, part in enumerate(scored)
    ]
    pooled = feedback.Pooled(seeds, ours)
    assert torch.equal(pooled.sums["tokens"], torch.tensor([10.0, 40.0, 30.0], dtype=torch.float64))
    assert torch.equal(pooled.sums["kl"], torch.tensor([1.0, 5.0, 4.0], dtype=torch.float64))
    figures = pooled.figures()
    assert figures["kl"] == 10 / 80 and figures["kl_by_seed"] == [0.1, pytest.approx(7 / 50)]
    assert figures["nats_per_token"] == pytest.approx((0.5 + 0.5 - 0.5 + 0.25) / 80, rel=1e-6)
    ratio = pooled.ratio(feedback.Pooled(seeds, theirs))
    assert ratio["ratio"] == 0.5 and ratio["interval"] == [0.5, 0.5], "half in every document: no doubt about it"
    assert [seed["ratio"] for seed in ratio["by_seed"]] == [0.5, 0.5]


def test_lists_of_figures_stand_on_one_line() -> None:
    text = script("feedback").dumps({"kl": [1.5, 2.5], "names": ["a b", "c"], "rows": [{"x": [1]}, {}]})
    assert '"kl": [1.5, 2.5]' in text and '"names": ["a b", "c"]' in text and '"x": [1]' in text
