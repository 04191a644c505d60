"""Samples through the model as it is and through quantized ones beside it: against whole models, one after another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import write_tiny_model
from torch import Tensor

from neoquant import GPTNeoForCausalLM
from neoquant.calibration.dataset import Calibration
from neoquant.checkpoint import open_checkpoint
from neoquant.grids import Affine, Int8Rows, make_grid
from neoquant.model.config import GPTNeoConfig
from neoquant.model.names import BLOCK_LINEARS
from neoquant.quantization.foreseeing import foresee, hold_out
from neoquant.quantization.quantize import plan
from neoquant.quantization.recipe import Recipe
from neoquant.quantization.sequential import read_block
from neoquant.quantization.trial import Trial
from neoquant.quantizers import Nearest


def predictions(folder: Path, ids: Tensor, change: dict[str, Tensor]) -> Tensor:
    """log p[R, T, V] of the model with these weights in place of its own."""
    model = GPTNeoForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, weight in change.items():
        model.get_submodule(name).weight.data.copy_(weight)
    with torch.no_grad():
        return model(ids).logits.double().log_softmax(-1)


def divergence(p: Tensor, q: Tensor) -> float:
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 25), (2, 32)])
def test_whole_models_one_after_another(tmp_path: Path, tied: bool, shape: tuple[int, int]) -> None:
    folder = write_tiny_model(tmp_path / "plain", hidden_size=32, num_heads=4, tie_word_embeddings=tied)
    ids = torch.randint(0, 200, shape, generator=torch.Generator().manual_seed(1))
    grids = (Affine(2, 16), Affine(4, 16))
    weights: list[dict[str, Tensor]] = [{}, {}]
    with open_checkpoint(folder) as checkpoint:
        config = GPTNeoConfig.from_dict(checkpoint.config)
        rows = plan(folder, Recipe.simple(4, "affine")).rows
        trial = Trial(checkpoint, config, ids, len(grids), ("int8", "nf4"))
        with torch.no_grad():
            for number in range(config.num_layers):
                block = read_block(checkpoint, [row for row in rows if row.block == number], config, number)
                linears = {name: block.get_submodule(name).weight.detach() for name in BLOCK_LINEARS}
                made = {name: [Nearest().quantize(w, grid) for grid in grids] for name, w in linears.items()}
                trial.through(block, made)
                for name, each in made.items():
                    assert torch.equal(block.get_submodule(name).weight, linears[name])
                    for on, q in zip(weights, each, strict=True):
                        on[f"transformer.h.{number}.{name}"] = q.dequantize(torch.float32)
            on_grids, of_tables = trial.losses()
    plain = predictions(folder, ids, {})
    wanted = [divergence(plain, predictions(folder, ids, on)) for on in weights]
    assert on_grids == pytest.approx(wanted, rel=2e-3, abs=1e-9) and min(on_grids) > 0
    model = GPTNeoForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, grid in (("int8", Int8Rows()), ("nf4", make_grid(4, "nf4"))):
        tables = ("transformer.wte",) if tied else ("transformer.wte", "lm_head")
        stored = {table: model.get_submodule(table).weight.detach() for table in tables}
        rounded = {table: Nearest().quantize(w, grid).dequantize(torch.float32) for table, w in stored.items()}
        assert of_tables[name] == pytest.approx(divergence(plain, predictions(folder, ids, rounded)), rel=2e-3)


def test_what_is_foreseen_sums_up_to_what_whole_models_lose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny_model(tmp_path / "plain", hidden_size=32, num_heads=4)
    ids = torch.randint(0, 200, (9, 24), generator=torch.Generator().manual_seed(0))
    wholes: list[float] = []
    losses = Trial.losses

    def watched(self: Trial) -> tuple[list[float], dict[str, float]]:
        assert torch.equal(self.ids, ids[-1:])
        found = losses(self)
        wholes.extend(found[0])
        return found

    monkeypatch.setattr(Trial, "losses", watched)
    with open_checkpoint(folder) as checkpoint:
        samples = Calibration(ids, "made up", "0" * 64, 0)
        found = foresee(checkpoint, samples, [Affine(2, 16), Affine(3, 16), Affine(8, 16)], embeddings=True)
    assert found.losses[:-1].sum(0).tolist() == pytest.approx(wholes)
    assert found.tables == ("int8", "nf4", "keep") and found.sizes.shape == found.losses.shape == (13, 3)
    kept, int8 = found.losses[-1, 2], found.losses[-1, 0]
    assert kept == 0 and int8 > 0 and found.sizes[-1, 2] > found.sizes[-1, 0] > found.sizes[-1, 1]


@pytest.mark.parametrize(("rows", "length", "held"), [(1, 8, 1), (2, 8, 1), (9, 8, 1), (40, 8, 5), (99, 2048, 2)])
def test_samples_that_are_not_shown(rows: int, length: int, held: int) -> None:
    ids = torch.arange(rows * length).view(rows, length)
    shown, kept_back = hold_out(Calibration(ids, "made up", "0" * 64, 0))
    assert torch.equal(kept_back, ids[-held:])
    assert torch.equal(shown.ids, ids if rows == 1 else ids[:-held])
