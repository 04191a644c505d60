"""Output-side Hessians for the loss: against autograd through the whole model; labels against their definition."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import write_tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neoquant.calibration import loss_hessian, memory
from neoquant.calibration.dataset import Calibration
from neoquant.calibration.loss_hessian import OutputMoments, draw_labels, drawn_uniforms, shrunk
from neoquant.calibration.memory import estimate_memory, gradient_rows
from neoquant.checkpoint import open_checkpoint
from neoquant.loading.load import load_model
from neoquant.loading.pretrained import GPTNeoForCausalLM
from neoquant.model.config import GPTNeoConfig
from neoquant.model.names import BLOCK_LINEARS
from neoquant.progress import SILENT
from neoquant.quantization.plan import make_plan
from neoquant.quantization.recipe import Recipe
from neoquant.quantization.resume import ResumableRun
from neoquant.quantization.reverse import look_at_unquantized, methods_of, needs_gradients

ROWS, LENGTH, SEED = 7, 24, 5
MODEL = Recipe.simple(4, "affine", group_size=16, quantizer="gptq", objective="model")


def calibration() -> Calibration:
    ids = torch.randint(0, 200, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    return Calibration(ids, "made up", "0" * 64, SEED)


def kept(folder: Path, out: Path, recipe: Recipe = MODEL, max_memory: int | None = None) -> list[dict[str, Tensor]]:
    """What the walk back leaves for each block."""
    with open_checkpoint(folder) as checkpoint, ResumableRun(out) as run:
        config, plan = GPTNeoConfig.from_dict(checkpoint.config), make_plan(checkpoint, recipe)
        needed = estimate_memory(config, ROWS, LENGTH, max_memory, methods_of(plan))
        run.begin({}, config.num_layers)
        look_at_unquantized(checkpoint, plan, calibration(), needed, run, SILENT)
        assert sorted(path.name.split("-")[0] for path in run.folder.iterdir()) == ["curvature"] * 2 + ["run.json"]
        rows = gradient_rows(ROWS, LENGTH)
        halves = [run.output_hessians(number) for number in range(config.num_layers)]
        found = [
            {name: (rows // 2 * one + (rows - rows // 2) * other) / rows for name, (one, other) in of_block.items()}
            for of_block in halves
        ]
        run.remove()
    return found


def through_the_whole_model(folder: Path, ids: Tensor) -> list[dict[str, Tensor]]:
    """The mean outer product of every gradient, one token after the other, in double precision."""
    model = load_model(folder, GPTNeoForCausalLM).double()
    model.requires_grad_(False)
    embedded = model.transformer.wte(ids).requires_grad_()
    outputs: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        layer.register_forward_hook(lambda _, given, y, name=name: outputs.update({name: y}))
    logits = model(inputs_embeds=embedded).logits.flatten(0, 1)
    p = logits.detach().softmax(1)
    first, second = (
        (p.cumsum(1) <= uniforms.double().flatten()[:, None] * p.sum(1, keepdim=True)).sum(1)
        for uniforms in drawn_uniforms(*ids.shape, SEED)
    )
    names = [f"transformer.h.{number}.{name}" for number in range(2) for name in BLOCK_LINEARS]
    losses = (F.cross_entropy(logits, labels, reduction="sum") for labels in (first, second))
    loss = (next(losses) - next(losses)) / 2**0.5
    gradients = dict(zip(names, torch.autograd.grad(loss, [outputs[name] for name in names]), strict=True))
    moments = {
        name: sum(torch.outer(g, g) for g in gradient.flatten(0, 1)) / ids.numel()
        for name, gradient in gradients.items()
    }
    return [{name: moments[f"transformer.h.{number}.{name}"] for name in BLOCK_LINEARS} for number in range(2)]


def assert_pieces(K: Tensor, whole: Tensor) -> None:
    """K[heads, D, D] are the blocks on the diagonal of whole[O, O], all of it unless O is a multiple of the width."""
    heads, size = K.shape[:2]
    assert heads * size == len(whole) and whole.abs().max() > 0
    for head, found in enumerate(K):
        rows = slice(head * size, (head + 1) * size)
        assert torch.allclose(found.double(), whole[rows, rows], rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tie_word_embeddings": False, "window_size": 5},
        {"hidden_size": 24, "num_heads": 3},
        {"hidden_size": 24, "num_heads": 2, "intermediate_size": 40},
    ],
    ids=str,
)
def test_against_autograd_through_the_whole_model(
    shape: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny_model(tmp_path / "plain", **shape)
    expected = through_the_whole_model(folder, calibration().ids)
    for positions, batch in ((512, ROWS), (10, 2)):
        monkeypatch.setattr(loss_hessian, "POSITIONS", positions)
        for module in ("quantization.resume", "calibration.hidden_states"):
            monkeypatch.setattr(f"neoquant.{module}.rows_of_batch", lambda length, batch=batch: batch)
        for found, theirs in zip(kept(folder, tmp_path / "out"), expected, strict=True):
            assert found.keys() == theirs.keys()
            width, inner = len(theirs["mlp.c_proj"]), len(theirs["mlp.c_fc"])
            assert {name: len(K) for name, K in found.items() if len(K) > 1} == (
                {} if inner % width else {"mlp.c_fc": inner // width}
            )
            for name, K in found.items():
                assert_pieces(K, theirs[name])


def test_in_files_and_in_memory_are_the_same(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "plain")
    config = GPTNeoConfig.from_pretrained(folder)
    with open_checkpoint(folder) as checkpoint:
        plan = make_plan(checkpoint, MODEL)
    plenty = estimate_memory(config, ROWS, LENGTH, methods=methods_of(plan)).memory
    assert plenty > estimate_memory(config, ROWS, LENGTH).memory
    for one, other in zip(
        kept(folder, tmp_path / "out"), kept(folder, tmp_path / "out", max_memory=plenty - 1), strict=True
    ):
        assert all(torch.equal(one[name], other[name]) for name in BLOCK_LINEARS)


def test_only_the_first_rows_and_the_layers_that_ask_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny_model(tmp_path / "plain")
    monkeypatch.setattr(memory, "_GRADIENT_TOKENS", 3 * LENGTH + 1)
    assert gradient_rows(ROWS, LENGTH) == 3 and gradient_rows(2, LENGTH) == 2 and gradient_rows(5, 1000) == 1
    rules = [
        {"match": "*.0.*.c_fc", "bits": 4, "type": "affine", "quantizer": "gptq", "objective": "model"},
        {"match": "*", "bits": 4, "type": "affine", "quantizer": "gptq", "objective": "attention"},
    ]
    recipe = Recipe.parse({"name": "some", "rules": rules})
    expected = through_the_whole_model(folder, calibration().ids[:3])
    first, second = kept(folder, tmp_path / "out", recipe)
    assert list(first) == ["mlp.c_fc"] and not second
    assert_pieces(first["mlp.c_fc"], expected[0]["mlp.c_fc"])  # uniforms of three rows are the first of those of seven
    with open_checkpoint(folder) as checkpoint:
        assert not needs_gradients(
            make_plan(checkpoint, Recipe.simple(4, "affine", quantizer="gptq", objective="layer"))
        )


@settings(deadline=None, max_examples=50)
@given(rows=st.integers(1, 9), classes=st.integers(1, 300), seed=st.integers(0, 99))
def test_labels_by_their_definition(rows: int, classes: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    p = (4 * torch.randn(rows, classes, generator=random, dtype=torch.float64)).softmax(1)
    uniforms = torch.rand(rows, 2, generator=random)
    uniforms[0, 0] = 0
    logits = p.log() + torch.randn(rows, 1, generator=random)
    for labels, row, drawn in zip(draw_labels(logits, uniforms).tolist(), p.tolist(), uniforms.tolist(), strict=True):
        for label, u in zip(labels, drawn, strict=True):
            below = sum(row[:label])
            assert below <= u + 1e-12 and u < below + row[label] + 1e-12


def test_labels_are_as_frequent_as_they_are_likely() -> None:
    p = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0])
    uniforms = drawn_uniforms(100, 400, 3).flatten(1).T
    labels = draw_labels(p.log().repeat(len(uniforms), 1), uniforms)
    pairs = (5 * labels[:, 0] + labels[:, 1]).bincount(minlength=25).view(5, 5) / len(uniforms)
    assert not pairs[[1, 4]].any() and not pairs[:, [1, 4]].any()
    assert torch.allclose(pairs, torch.outer(p, p), atol=0.01)  # independent of each other


def test_drawing_labels_warns_of_nothing() -> None:
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            labels = draw_labels(torch.zeros(3, 5), torch.rand(2, 3).T)  # as those of two draws lie
    finally:
        torch.set_warn_always(False)
    assert labels.shape == (3, 2)


def halves_of(gradients: Tensor, width: int, first: int | None) -> tuple[Tensor, Tensor]:
    moments = OutputMoments(gradients.shape[2], width, first=first)
    for some in torch.split(gradients, 2):
        moments.add(some)
    moments.require_finite()
    return moments.matrices()


@pytest.mark.parametrize(("outputs", "width"), [(6, 6), (12, 6), (10, 6)])
@pytest.mark.parametrize("first", [2, 3])
def test_moments_of_halves(outputs: int, width: int, first: int) -> None:
    gradients = torch.randn(5, 9, outputs, generator=torch.Generator().manual_seed(0))
    halves = halves_of(gradients, width, first)
    for found, samples in zip(halves, (gradients[:first], gradients[first:]), strict=True):
        tokens = samples.flatten(0, 1).double()
        assert_pieces(found, sum(torch.outer(g, g) for g in tokens) / len(tokens))


def test_one_sample_counts_as_two() -> None:
    gradients = torch.randn(1, 8, 6, generator=torch.Generator().manual_seed(0))
    halves = halves_of(gradients.view(2, 4, 6), 6, 1)
    for found, expected in zip(halves_of(gradients, 6, None), halves, strict=True):
        assert torch.allclose(found, expected, atol=1e-6)


def lost(first: Tensor, second: Tensor, part: float, every: int) -> float:
    """What errors of one in each row add up to in the second half, compensated by the first, in double precision: row
    after row, each error moves all later rows to where the first half has them lose least."""
    K = first.double() + (part * first.diagonal() + 0.001 * first.diagonal().mean()).double().diag()
    order = first.diagonal().argsort(descending=True, stable=True)
    K, other = K[order[:, None], order], second.double()[order[:, None], order]
    total = 0.0
    for i in range(0, len(K), every):
        error = torch.zeros(len(K), dtype=torch.float64)
        error[i] = 1
        error[i + 1 :] = -torch.linalg.solve(K[i + 1 :, i + 1 :], K[i + 1 :, i])
        total += float(error @ other @ error)
    return total


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 9), tokens=st.integers(2, 60), every=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_part_that_is_chosen(size: int, tokens: int, every: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=random)
    first, second = (g.T @ g / tokens for g in torch.randn(2, tokens, size, generator=random) @ mixing)
    losses = [lost(first, second, part, every) for part in loss_hessian.PARTS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_hessian, "EVERY", every)
        found = loss_hessian.PARTS.index(loss_hessian.chosen_part(first, second, 0.001))
    tied = 1e-3 * losses[0]
    assert all(losses[n + 1] < losses[n] + tied for n in range(found))
    assert found == len(losses) - 1 or losses[found + 1] > losses[found] - tied


def test_shrunk_as_much_as_halves_differ() -> None:
    """Hardly where they are alike, the most where they have nothing in common; diagonals are kept."""
    random = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=random)
    alike = (torch.randn(1, 300, 12, generator=random) @ mixing).expand(6, 300, 12)
    other = torch.randn(6, 300, 12, generator=random) @ mixing
    few = torch.randn(6, 2, 60, generator=random)
    for gradients, part in ((alike, 0.001), (other, 0.001), (few, 1.0)):
        K = gradients.flatten(0, 1).T @ gradients.flatten(0, 1) / gradients[..., 0].numel()
        found = shrunk(*halves_of(gradients, gradients.shape[2], 2), 2 / 6)[0]
        assert torch.allclose(found.diagonal(), K.diagonal(), rtol=1e-4)
        expected = (K - K.diagonal().diag()) / (1 + part)
        assert torch.allclose(found - found.diagonal().diag(), expected, rtol=1e-3, atol=1e-4 * float(K.max()))


def test_nothing_to_learn_of_outputs_that_do_not_count() -> None:
    nothing = torch.zeros(1, 4, 4)
    assert torch.equal(shrunk(nothing, nothing, 0.5), nothing)
