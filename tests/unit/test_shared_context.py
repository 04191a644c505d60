"""Continuations of one context are scored as each by itself, and the context is read once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import neoquant
from neoquant.evaluation.corpus import Window
from neoquant.evaluation.scoring import score_batches
from neoquant.evaluation.shared_context import WORTHWHILE, SharedContext, by_context


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return neoquant.load(tiny_model)[0]  # a local layer sees 4 positions, of contexts up to 32


def windows_of(context: list[int], continuations: list[list[int]]) -> list[Window]:
    return [Window(0, torch.tensor(context + rest, dtype=torch.int32), len(rest)) for rest in continuations]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 17, 24])
@pytest.mark.parametrize("lengths", [(3, 1, 7), (1, 1, 1), (5, 5), (8,)])
def test_scores_are_those_of_each_alone(model: Any, length: int, lengths: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(length)
    context = torch.randint(1, 250, (length,), generator=draw).tolist()
    windows = windows_of(context, [torch.randint(1, 250, (n,), generator=draw).tolist() for n in lengths])
    ((scores,),) = score_batches([SharedContext(model)], [windows], 128, lambda _: None)
    found = torch.split(scores.nats, list(lengths))
    hits = torch.split(scores.hit, list(lengths))
    for window, nats, hit in zip(windows, found, hits, strict=True):
        ids = window.ids.long()[None]
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits[0, -window.scored :].double()
        expected = -logits.log_softmax(-1).gather(-1, ids[0, -window.scored :, None])[:, 0]
        assert (nats - expected).abs().max() <= 1e-6 * expected.abs().max()
        assert torch.equal(hit.bool(), logits.argmax(-1) == ids[0, -window.scored :])


def test_a_context_is_read_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, ...]] = []
    transformer = model.transformer.forward

    def told(ids: torch.Tensor, *args: Any, **options: Any) -> Any:
        read.append(tuple(ids.shape))
        return transformer(ids, *args, **options)

    monkeypatch.setattr(model.transformer, "forward", told)
    windows = windows_of(list(range(1, 21)), [[30, 31, 32], [40, 41, 42], [30, 51]])
    list(score_batches([SharedContext(model)], [windows], 128, lambda _: None))
    assert read == [(1, 20), (3, 2)]
    read.clear()
    list(score_batches([SharedContext(model)], [windows_of([5, 6, 7], [[1], [2], [3]])], 128, lambda _: None))
    assert read == [(1, 3)], "answers of one token need nothing else"


def test_contexts_are_found(model: Any) -> None:
    long, other = list(range(WORTHWHILE)), list(range(1, WORTHWHILE + 1))
    windows = [
        *windows_of(long, [[1], [2, 3]]), *windows_of(other, [[1]]), *windows_of([7], [[1], [2]]),
        *windows_of(long, [[4]]),
    ]  # fmt: skip
    assert list(by_context(windows, 1024)) == [[0, 1, 5]]
    assert list(by_context(windows, 140)) == [[0, 1]], "what is left over is scored with the others"
