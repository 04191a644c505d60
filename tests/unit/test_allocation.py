"""Mixed precision to order: the best choice against all choices, targets met, a model made to order."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import Cli, write_tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from neoquant.calibration.dataset import Calibration
from neoquant.checkpoint import open_checkpoint
from neoquant.errors import RequestError
from neoquant.grids import Affine, Grid, TrellisGrid
from neoquant.quantization import allocation
from neoquant.quantization.allocation import Candidates, allocate, frontier
from neoquant.quantization.foreseeing import foresee
from neoquant.quantization.quantize import quantize

GRIDS: tuple[Grid, ...] = (TrellisGrid(64), Affine(3, 64), Affine(4, 64), Affine(8, 128))


def candidates(layers: int, grids: int, seed: int, ragged: bool = True) -> Candidates:
    random = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 90, (layers, grids), generator=random) if ragged else torch.arange(1, grids + 1) * 7
    losses = torch.rand(layers, grids, generator=random, dtype=torch.float64)
    names = tuple(f"transformer.h.{number}.mlp.c_fc" for number in range(layers))
    return Candidates(names, GRIDS[:grids], sizes.expand(layers, grids).clone(), losses, 8 * layers)


@settings(deadline=None, max_examples=60)
@given(layers=st.integers(1, 6), grids=st.integers(1, 4), seed=st.integers(0, 999), part=st.floats(0, 1.2))
def test_the_best_of_all_choices(layers: int, grids: int, seed: int, part: float) -> None:
    given_ = candidates(layers, grids, seed)
    low, high = int(given_.sizes.min(1).values.sum()), int(given_.sizes.max(1).values.sum())
    budget = low + int(part * (high - low))
    found = allocate(given_, budget)
    fitting = [
        sum(float(given_.losses[layer, grid]) for layer, grid in enumerate(choice))
        for choice in product(range(grids), repeat=layers)
        if sum(int(given_.sizes[layer, grid]) for layer, grid in enumerate(choice)) <= budget
    ]
    assert found.size <= budget and found.loss == pytest.approx(min(fitting), abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(slots=st.integers(1, 40), seed=st.integers(0, 999), part=st.floats(0, 1.2))
def test_sizes_that_are_not_told_apart_still_fit(slots: int, seed: int, part: float) -> None:
    given_ = candidates(6, 4, seed)
    low, high = int(given_.sizes.min(1).values.sum()), int(given_.sizes.max(1).values.sum())
    budget = low + int(part * (high - low))
    best = allocate(given_, budget).loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "SLOTS", slots)
        found = allocate(given_, budget)
    assert found.size <= budget and found.loss >= best - 1e-12


@settings(deadline=None, max_examples=40)
@given(layers=st.integers(1, 4), seed=st.integers(0, 999), part=st.floats(0, 1.2))
def test_embeddings_take_part(layers: int, seed: int, part: float) -> None:
    linears = candidates(layers, 4, seed)
    sizes, losses = {"nf4": 17, "int8": 31, "keep": 60}, {"nf4": 0.4, "int8": 0.1, "keep": 0.0}
    together = linears.with_tables(sizes, losses)
    low, high = (int(each.values.sum()) for each in (linears.sizes.min(1), linears.sizes.max(1)))
    budget = low + 17 + int(part * (high - low + 43))
    found = allocate(together, budget)
    wanted = min(
        allocate(linears, budget - sizes[name]).loss + losses[name] for name in sizes if budget - sizes[name] >= low
    )
    assert found.loss == pytest.approx(wanted, abs=1e-12) and found.size <= budget
    assert found.embeddings in sizes and found.recipe().embeddings == found.embeddings
    assert len(found.of_linears) == layers == len(found.recipe().rules)
    assert found.bits == linears.bits(found.size - sizes[str(found.embeddings)])


def test_too_small_a_target_is_refused() -> None:
    few = candidates(3, 3, 0, ragged=False)
    with pytest.raises(RequestError, match=r"0.667 bits a weight: legal is 7.000 to 21.000"):
        allocate(few, 2)
    with pytest.raises(RequestError, match=r"2 bytes of the linears and embeddings: legal is 28 to 75 bytes of the"):
        allocate(few.with_tables({"nf4": 7, "int8": 9, "keep": 12}, {"nf4": 1.0, "int8": 0.5, "keep": 0.0}), 2)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 99), target=st.floats(3.0, 8.0))
def test_targets_are_met_within_half_a_percent(seed: int, target: float) -> None:
    """Of GPT-Neo's shapes, from below: losses that fall with the bits leave nothing unused."""
    random = torch.Generator().manual_seed(seed)
    shapes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    per_weight = torch.tensor([g.bits + 8 * 3 / int(vars(g)["group_size"]) for g in GRIDS], dtype=torch.float64)
    numels = torch.tensor([o * i for o, i in shapes] * 12)
    sizes = (numels[:, None] * per_weight / 8).long()
    scale = torch.rand(len(numels), 1, generator=random, dtype=torch.float64)
    many = Candidates(tuple(map(str, range(len(numels)))), GRIDS, sizes, scale * 4.0**-per_weight, int(numels.sum()))
    found = allocate(many, int(target * many.weights / 8))
    assert found.bits <= target
    left = int(target * many.weights / 8) - found.size
    for layer, grid in enumerate(found.choice):
        assert grid == len(GRIDS) - 1 or sizes[layer, grid + 1] - sizes[layer, grid] > left
    if target <= 7:  # above, nearly all layers have 8 bits, and the best choice may leave less than a large one's step
        assert found.bits >= 0.995 * target


def test_the_frontier_falls() -> None:
    points = frontier(candidates(9, 4, 3), steps=8)
    assert [point.size for point in points] == sorted(point.size for point in points)
    losses = [point.loss for point in points]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]


def test_a_model_to_order(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "plain", hidden_size=32, num_heads=4)
    ids = torch.randint(0, 200, (6, 24), generator=torch.Generator().manual_seed(0))
    calibration = Calibration(ids, "made up", "0" * 64, 0)
    with open_checkpoint(folder) as checkpoint:
        found = foresee(checkpoint, calibration, [Affine(2, 16), Affine(4, 16), Affine(8, 16)])
        again = foresee(checkpoint, calibration, [Affine(2, 16), Affine(4, 16), Affine(8, 16)])
    assert len(found.layers) == 12 and torch.equal(found.losses, again.losses)
    assert bool((found.losses > 0).all())
    assert bool((found.losses[:, 0] > found.losses[:, 1]).all() and (found.losses[:, 1] > found.losses[:, 2]).all())
    target = 4.5
    chosen = allocate(found, int(target * found.weights / 8))
    made = quantize(folder, tmp_path / "out", chosen.recipe(), calibration=calibration)
    assert made.plan.bits_per_weight_linears == pytest.approx(chosen.bits)
    assert chosen.bits <= target and len({row.grid for row in made.plan.rows if row.is_linear}) > 1
    assert "bits a weight of the linears, foreseen to add" in made.plan.recipe.description


WORDS = ("--rows", 4, "--length", 16)


def test_the_command_line_makes_it(cli: Cli, make_model: Callable[..., Path], tmp_path: Path, text_file: Path) -> None:
    folder = make_model(hidden_size=32, num_heads=4)
    asked = ("quantize", folder, "--calibration", text_file, *WORDS)
    done = cli(*asked, "--target-bits", 5, "--out", tmp_path / "bits")
    assert done.code == 0, done.err
    assert "Layers by their grids" in done.out and " *" in done.out
    record = json.loads((tmp_path / "bits" / "neoquant.json").read_text())
    assert 4.5 < record["bits_per_weight_linears"] <= 5 and record["format"] == "packed"
    limit = record["weights_bytes"] + 200
    done = cli(*asked, "--target-size", limit // 2, "--embeddings", "keep", "--out", tmp_path / "size")
    assert done.code == 2 and "bits a weight: legal is" in done.error  # the embedding alone takes more
    done = cli(*asked, "--target-size", limit, "--out", tmp_path / "size")
    assert done.code == 0, done.err
    weights = sum(path.stat().st_size for path in (tmp_path / "size").glob("*.safetensors"))
    assert 0.9 * limit < weights <= limit
    assert json.loads((tmp_path / "size" / "neoquant.json").read_text())["recipe"]["embeddings"] in ("int8", "nf4")
    assert "embeddings" in done.out
    dry = cli(*asked, "--target-bits", 5, "--dry-run")
    assert dry.code == 0 and "was not written" in dry.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--target-bits", 3), "--target-bits needs calibration samples"),
        (("--target-bits", 3, "--target-size", "1MB"), "both say how large: give one of them"),
        (("--target-bits", "nan"), "--target-bits nan: give bits a weight, like 3.2"),
        (("--target-size", "small"), "'small' is not a size"),
        (("--target-bits", 3, "--bits", 4), "--target-bits decides the grids, so --bits cannot be given with it"),
        (("--target-bits", 3, "--recipe", "nf4"), "--target-bits decides the grids, so --recipe cannot be given"),
        (("--target-bits", 3, "--keep", "*.c_fc"), "decides about every layer, so --keep cannot be given with it"),
        (("--target-bits", 3, "--format", "gptq"), "different grids, which format gptq does not hold"),
        (("--target-bits", 3, "--device", "cuda"), "computes gradients, on the CPU: leave --device cuda out"),
        (("--target-bits", 1), "1.000 bits a weight: legal is"),
    ],
)
def test_targets_that_cannot_be_met(
    cli: Cli, tiny_model: Path, tmp_path: Path, text_file: Path, words: tuple[object, ...], message: str
) -> None:
    calibration = () if message.endswith("calibration samples") else ("--calibration", text_file, *WORDS)
    done = cli("quantize", tiny_model, *words, *calibration, "--out", tmp_path / "out")
    assert done.code in (1, 2) and message in done.error
    assert not (tmp_path / "out").exists()
