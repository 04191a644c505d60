"""Tuning: what is held in floating point moves, what is not stays, and the loss on the samples never rises."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from conftest import Cli, write_tiny_model
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from weights import affine_grids, codebooks

import neoquant
from neoquant.calibration.dataset import Calibration
from neoquant.cli.describe import calibrated_on, model_info
from neoquant.errors import CheckpointError, FormatError, NeoquantError, OutputError, RequestError
from neoquant.grids import Grid
from neoquant.grids.int8 import Int8Rows
from neoquant.grids.mxfp4 import Mxfp4
from neoquant.grids.trellis import TrellisGrid
from neoquant.nn.linear import QuantLinear
from neoquant.progress import SILENT, Progress
from neoquant.quantization.recipe import Recipe
from neoquant.report.provenance import _calibrated
from neoquant.tensor import QuantizedTensor
from neoquant.tuning import training
from neoquant.tuning.layers import TunableLinear
from neoquant.tuning.prediction_loss import POSITIONS, prediction_loss
from neoquant.tuning.training import Predictor, Samples
from neoquant.tuning.tune import tune

WIDE = {"hidden_size": 32, "num_heads": 2, "vocab_size": 259}
RECIPES: dict[str, dict[str, Any]] = {
    "nf4": {"bits": 4, "type": "nf4"},
    "fp4": {"bits": 4, "type": "fp4", "double_quant": False, "block_size": 32},
    "int8": {"bits": 8, "type": "int8"},
    "gptq": {"bits": 3, "type": "affine", "group_size": 16, "keep": ["*.c_proj"]},
    "compressed-tensors": {"format": "compressed-tensors", "bits": 8, "type": "affine", "group_size": -1},
    "float zeros": {"bits": 2, "type": "affine", "group_size": 16, "float_zero": True},
    "mxfp4": {"bits": 4, "type": "mxfp4"},
    "trellis": {"bits": 2, "type": "trellis"},
}  # fmt: skip

trellises = st.builds(TrellisGrid, bits=st.sampled_from([2, 3]))
grids = st.one_of(codebooks, affine_grids, trellises, st.just(Int8Rows()), st.just(Mxfp4()))
shapes = st.tuples(st.integers(1, 40), st.integers(1, 140))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("plain") / "original", **WIDE)


@pytest.fixture(scope="module")
def quantized(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a recipe, made once."""
    made, home = {}, tmp_path_factory.mktemp("quantized")

    def make(name: str) -> Path:
        if name not in made:
            made[name] = home / name.replace(" ", "-")
            neoquant.quantize(original, made[name], Recipe.model_validate({"name": "a", **_rules(RECIPES[name])}))
        return made[name]

    return make


def _rules(options: dict[str, Any]) -> dict[str, Any]:
    """A recipe of one rule, behind those of layers that are kept."""
    kept = [{"match": each, "keep": True} for each in options.get("keep", ())]
    whole = {key: options[key] for key in ("format",) if key in options}
    rule = {key: value for key, value in options.items() if key not in ("keep", "format")}
    return {**whole, "rules": [*kept, {"match": "*", **rule}]}


def samples(rows: int = 6, length: int = 24, seed: int = 3) -> Calibration:
    ids = torch.randint(0, WIDE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))
    return Calibration(ids, "dice", "0" * 64, seed, ("one", "two"))


def measured(folder: Path, original: Path, ids: Tensor) -> float:
    """The mean divergence of a folder's predictions from the original's on the samples that are held out, by the
    library's own logits, in float64."""
    ids = ids[-max(1, len(ids) // 8) :]
    models = [neoquant.GPTNeoForCausalLM.from_pretrained(each, dtype=torch.float32) for each in (original, folder)]
    with torch.no_grad():
        aim, predicted = (model(ids).logits.double().log_softmax(-1) for model in models)
    return float(F.kl_div(predicted, aim, log_target=True, reduction="none").sum(-1).mean())


def weights(folder: Path) -> dict[str, QuantizedTensor]:
    model = neoquant.GPTNeoForCausalLM.from_pretrained(folder)
    return {name: module.quantized for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@hypothesis.given(st.integers(1, 2 * POSITIONS + 3), st.integers(0, 9))
@hypothesis.settings(max_examples=10)
def test_the_loss_and_its_gradient_are_those_of_whole_logits(positions: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    h, aim = (torch.randn(positions, width, generator=random) for width in (5, 3))
    head, aim_head = (torch.randn(11, width, generator=random) for width in (5, 3))
    h.requires_grad_()
    loss = prediction_loss(h, head, aim, aim_head)
    (3 * loss).backward()
    exact = h.detach().double().requires_grad_()
    p, q = ((x.double() @ y.double().T).softmax(-1) for x, y in ((aim, aim_head), (exact, head)))
    expected = (p * (p / q).log()).sum(-1).mean()
    (3 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert torch.allclose(h.grad.double(), exact.grad, atol=1e-5, rtol=1e-3)


@hypothesis.given(grids, shapes, st.booleans(), st.integers(0, 9))
@hypothesis.settings(max_examples=60)
def test_a_tunable_layer_is_its_weight_and_sums_gradients_of_groups(
    grid: Grid, shape: tuple[int, int], ordered: bool, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    codes, params = grid.nearest(torch.randn(shape, generator=random))
    order = torch.randperm(shape[1], generator=random).int() if ordered else None
    q = QuantizedTensor(codes, grid, params, order)
    layer = TunableLinear(q, torch.randn(shape[0], generator=random))
    assert torch.equal(layer.weight, q.dequantize(torch.float32))
    x, given = (torch.randn(3, size, generator=random) for size in (shape[1], shape[0]))
    (layer(x) * given).sum().backward()
    assert layer.bias is not None and torch.allclose(layer.bias.grad, given.sum(0), atol=1e-5)
    if layer.change is None:
        assert isinstance(grid, Mxfp4)
        return
    # by definition: each scale's share of the output, from the weight alone
    at_weight = given.T @ x * q.dequantize(torch.float32)
    laid = at_weight if order is None else at_weight[:, order.long()]
    laid = laid.reshape(1, -1) if grid.decoding.flat else laid
    expected = torch.stack([group.sum(1) for group in laid.split(grid.decoding.width(laid.shape[1]), 1)], 1)
    assert torch.allclose(layer.change.grad, expected, atol=1e-4, rtol=1e-3)


@hypothesis.given(grids, shapes, st.integers(0, 9))
@hypothesis.settings(max_examples=60)
def test_settling_keeps_codes_and_rounds_scales_as_the_grid_stores_them(
    grid: Grid, shape: tuple[int, int], seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    codes, params = grid.nearest(torch.randn(shape, generator=random))
    layer = TunableLinear(QuantizedTensor(codes, grid, params))
    if layer.change is None:
        return
    layer.settle()
    assert layer.q.params is params  # untouched, though storing absmax again might round it again
    with torch.no_grad():
        layer.change += 0.1 * torch.rand(layer.change.shape, generator=random)
        wanted = layer.weight.clone()
    layer.settle()
    assert torch.equal(layer.q.codes, codes) and not layer.change.any()
    assert torch.equal(layer.weight, layer.q.dequantize(torch.float32))
    # float16's half an ulp; 8 bits of double quantization: of what is left when the mean is taken off
    coarse = getattr(grid, "double_quant", False)
    assert (layer.weight - wanted).abs().max() <= (0.02 if coarse else 5e-4) * wanted.abs().max() + 1e-7
    if "zero" in params:
        assert torch.equal(layer.q.params["zero"], params["zero"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_format_is_tuned_and_says_the_truth(
    recipe: str, quantized: Callable[[str], Path], original: Path, tmp_path: Path
) -> None:
    source, shown = quantized(recipe), samples(16)
    rate = 1e-4 if RECIPES[recipe]["bits"] == 8 else 3e-3  # at 8 bits there is next to nothing to be gained
    made = tune(source, tmp_path / "out", base=original, calibration=shown, steps=12, learning_rate=rate)
    assert made.changed and made.after < made.before
    assert made.before == pytest.approx(measured(source, original, shown.ids), rel=2e-3)
    assert made.after == pytest.approx(measured(tmp_path / "out", original, shown.ids), rel=2e-3)
    former, now = weights(source), weights(tmp_path / "out")
    assert former.keys() == now.keys()
    for name, q in former.items():
        assert torch.equal(q.codes, now[name].codes) and q.grid == now[name].grid
        assert "zero" not in q.params or torch.equal(q.params["zero"], now[name].params["zero"])
    stored = [load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out")]
    spelled = [{name: (tensor.dtype, tensor.shape) for name, tensor in each.items()} for each in stored]
    if recipe != "nf4":  # whose offset is a decimal number in JSON
        assert spelled[0] == spelled[1]
    moved = {name for name in stored[0] if not torch.equal(stored[0][name], stored[1][name])}
    assert {"transformer.ln_f.weight", "transformer.h.0.mlp.c_fc.bias"} <= moved
    assert not {name for name in moved if ".wte" in name or ".wpe" in name}
    assert json.loads((source / "config.json").read_text()) == json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize("learning_rate", [1.0, 0.1, 1e-2, 1e-4, 1e-9])
@pytest.mark.parametrize("recipe", ["nf4", "gptq"])
def test_the_loss_on_the_samples_never_rises(
    recipe: str, learning_rate: float, quantized: Callable[[str], Path], original: Path, tmp_path: Path
) -> None:
    source, out, shown = quantized(recipe), tmp_path / "out", samples(3, 17)
    made = tune(source, out, base=original, calibration=shown, steps=3, learning_rate=learning_rate)
    assert measured(out, original, shown.ids) <= measured(source, original, shown.ids) * (1 + 1e-6)
    if not made.changed:
        assert made.after >= made.before
        assert (out / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
        assert "as they came" in (out / "README.md").read_text()


@pytest.mark.parametrize(("rows", "held"), [(1, 1), (2, 1), (7, 1), (8, 1), (17, 2)])
def test_samples_that_are_held_out_are_never_trained_on(rows: int, held: int, original: Path) -> None:
    model = neoquant.GPTNeoForCausalLM.from_pretrained(original, dtype=torch.float32)
    shown = Samples(samples(rows).ids, Predictor(model), lambda amount: None)
    assert shown.held == held
    taken = torch.cat(list(itertools.islice(shown.order(1), 3 * rows)))
    counts = taken.bincount(minlength=rows)
    assert rows == 1 or counts[rows - held :].sum() == 0
    assert counts[: max(1, rows - held)].min() >= 1  # and all others are


def test_a_rate_that_is_too_high_changes_nothing(
    quantized: Callable[[str], Path], original: Path, tmp_path: Path
) -> None:
    made = tune(quantized("gptq"), tmp_path / "out", base=original, calibration=samples(), steps=2, learning_rate=1.0)
    assert not made.changed and made.record()["changed"] is False


def test_the_same_request_gives_the_same_bytes(
    quantized: Callable[[str], Path], original: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / "first" / "out", tmp_path / "second" / "out"]
    for folder in folders:
        tune(quantized("nf4"), folder, base=original, calibration=samples(), steps=5)
    for path in folders[0].iterdir():
        assert path.read_bytes() == (folders[1] / path.name).read_bytes()


def test_activations_that_are_computed_again_change_nothing(
    quantized: Callable[[str], Path], original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {}
    for held in (0, 1 << 40):
        monkeypatch.setattr(training, "_HELD", held)
        out = tmp_path / str(held)
        tune(quantized("gptq"), out, base=original, calibration=samples(), steps=4)
        made[held] = (out / "model.safetensors").read_bytes()
    assert made[0] == made[1 << 40]


def test_what_others_spelled_stays_as_they_spelled_it(
    quantized: Callable[[str], Path], original: Path, tmp_path: Path
) -> None:
    """Version 1 of GPTQ's format, which neoquant would write as version 2."""
    source = tmp_path / "v2"
    rule = {"match": "*", "bits": 4, "type": "affine", "group_size": 16, "symmetric": True}
    neoquant.quantize(original, source, Recipe.model_validate({"name": "a", "format": "gptq-v2", "rules": [rule]}))
    made = tune(source, tmp_path / "out", base=original, calibration=samples(), steps=6)
    assert made.changed
    assert (source / "config.json").read_bytes() == (tmp_path / "out/config.json").read_bytes()
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    for name in before:
        if name.endswith((".qzeros", ".qweight", ".g_idx")):
            assert torch.equal(before[name], after[name])


def test_records_card_and_overlap_say_that_it_was_trained(
    quantized: Callable[[str], Path], original: Path, tmp_path: Path, cli: Cli
) -> None:
    out = tmp_path / "out"
    made = tune(quantized("gptq"), out, base=original, calibration=samples(16), steps=7, learning_rate=2e-3)
    assert made.changed
    tuned = json.loads((out / "neoquant.json").read_text())["tuned"]
    assert tuned["steps"] == 7 and tuned["base"] == "original" and tuned["loss"]["after"] == made.after
    assert json.loads((out / "neoquant.json").read_text())["recipe"]["name"] == "a"  # what was known stays known
    assert [point[0] for point in tuned["curve"]] == list(range(1, 8))
    assert calibrated_on(out, None, SILENT) == {"one", "two"}
    card = (out / "README.md").read_text()
    assert "# out\n" in card and "7 steps of Adam (learning rate 0.002) on 16 samples of 24 tokens of dice" in card
    assert "Not measured yet" in card and "## Recipe" in card
    line = next(line for line in cli("info", out).out.splitlines() if line.startswith("tuned"))
    assert "7 steps" in line and "dice" in line and f"{made.after:.3g} after" in line
    said = model_info(out, None, "out", SILENT).calibration
    assert said is not None and said["tuned"]["steps"] == 7 and said["tuned"]["loss"]["after"] == made.after
    facts = _calibrated(said)
    assert facts.endswith("tuned by 7 steps on dice, 16 samples of 24 tokens, seed 3")
    neoquant.convert(out, tmp_path / "own", "neoquant")
    assert "7 steps" in cli("info", tmp_path / "own").out
    assert calibrated_on(tmp_path / "own", None, SILENT) == {"one", "two"}
    again = tune(out, tmp_path / "again", base=original, calibration=samples(seed=4), steps=2)
    assert again.before > 0 and (tmp_path / "again/README.md").read_text().count("## Tuning") == 1


def test_the_documents_of_both_texts_count(quantized: Callable[[str], Path], original: Path, tmp_path: Path) -> None:
    once = Calibration(samples().ids, "dice", "0" * 64, 0, ("zero", "one"))
    tune(quantized("nf4"), tmp_path / "a", base=original, calibration=once, steps=1)
    tune(tmp_path / "a", tmp_path / "b", base=original, calibration=samples(), steps=1)
    assert calibrated_on(tmp_path / "b", None, SILENT) == {"zero", "one", "two"}


def test_an_original_in_another_type_is_noted(quantized: Callable[[str], Path], original: Path, tmp_path: Path) -> None:
    single = neoquant.GPTNeoForCausalLM.from_pretrained(original, dtype=torch.float32)
    single.save_pretrained(tmp_path / "single")
    made = [
        tune(quantized("nf4"), tmp_path / base.name / "out", base=base, calibration=samples(), steps=3)
        for base in (original, tmp_path / "single")
    ]
    assert made[0].notes == () and "other weights than single's" in made[1].notes[0]
    assert made[0].before == made[1].before  # the values are the same


def test_a_bare_decoder_is_tuned_by_its_tied_head(original: Path, tmp_path: Path) -> None:
    """Tensors without `transformer.` before their names, as GPTNeoModel stores them."""
    neoquant.GPTNeoModel.from_pretrained(original, dtype="auto").save_pretrained(tmp_path / "bare")
    neoquant.quantize(tmp_path / "bare", tmp_path / "q", "nf4")
    made = tune(tmp_path / "q", tmp_path / "out", base=original, calibration=samples(), steps=6)
    assert made.changed
    assert made.after == pytest.approx(measured(tmp_path / "out", original, samples().ids), rel=2e-3)


DEEP: dict[str, Any] = {
    "num_layers": 3,
    "attention_types": [[["global"], 3]],
    "attention_layers": ["global", "global", "global"],
}


def _other(home: Path, **changes: Any) -> Path:
    return write_tiny_model(home / "other", **{**WIDE, **changes})


def _not_a_number(home: Path) -> Path:
    folder = _other(home)
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.weight"][3] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        (lambda home, q, base: {"source": base}, RequestError, "is not quantized"),
        (lambda home, q, base: {"base": q}, RequestError, "is quantized itself"),
        (lambda home, q, base: {"base": _other(home, hidden_size=48)}, RequestError, "has hidden_size 48"),
        (lambda home, q, base: {"base": _other(home, **DEEP)}, RequestError, "has num_layers 3"),
        (lambda home, q, base: {"base": _other(home, window_size=5)}, RequestError, "has window_size 5"),
        (lambda home, q, base: {"base": _not_a_number(home)}, CheckpointError, "are not finite"),
        (lambda home, q, base: {"base": home / "missing"}, NeoquantError, "missing"),
        (lambda home, q, base: {"source": home / "missing"}, NeoquantError, "missing"),
        (lambda home, q, base: {"out": q}, RequestError, "would be lost"),
        (lambda home, q, base: {"out": base, "force": True}, RequestError, "would be lost"),
        (lambda home, q, base: {"out": home}, OutputError, "exists"),
        (lambda home, q, base: {"calibration": samples(2, 33)}, RequestError, "33 tokens"),
        (lambda home, q, base: {"steps": 0}, RequestError, "0 steps"),
        (lambda home, q, base: {"learning_rate": 0.0}, RequestError, "learning rate 0"),
        (lambda home, q, base: {"learning_rate": math.nan}, RequestError, "learning rate nan"),
    ],
)  # fmt: skip
def test_what_cannot_be_tuned_is_refused_in_one_line(
    changed: Callable[[Path, Path, Path], dict[str, Any]],
    error: type[NeoquantError],
    words: str,
    quantized: Callable[[str], Path],
    original: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "note").write_text("mine")
    given = {
        "source": quantized("nf4"),
        "out": tmp_path / "out",
        "base": original,
        "calibration": samples(),
        "steps": 2,
    }
    given |= changed(tmp_path / "home", quantized("nf4"), original)
    with pytest.raises(error) as raised:
        tune(given.pop("source"), given.pop("out"), **given)
    assert words in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


class Impatient(Progress):
    """Presses Ctrl-C in the middle of the steps."""

    @contextmanager
    def task(self, label: str, total: float | None) -> Iterator[Callable[[float], None]]:
        done = 0

        def advance(amount: float) -> None:
            nonlocal done
            done += 1
            if label == "tuning" and done == 2:
                raise KeyboardInterrupt

        yield advance


def test_an_interruption_leaves_nothing(quantized: Callable[[str], Path], original: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(quantized("nf4"), tmp_path / "out", base=original, calibration=samples(), steps=4, progress=Impatient())
    assert not list(tmp_path.iterdir())


def test_a_format_that_can_only_be_read_is_refused_before_the_work(
    quantized: Callable[[str], Path], original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neoquant.formats import CompressedTensors

    source = quantized("compressed-tensors")
    monkeypatch.setattr(CompressedTensors, "refuse_tensor", lambda self, q: "an order is read, but not written")
    with pytest.raises(RequestError, match="could be read, but not written: an order"):
        tune(source, tmp_path / "out", base=original, calibration=samples(), steps=2)


def test_scales_beyond_their_type_are_refused_naming_the_layer() -> None:
    grid = TrellisGrid()
    codes, params = grid.nearest(torch.randn(4, 8))
    layer = TunableLinear(QuantizedTensor(codes, grid, {"scale": torch.full_like(params["scale"], 6e4)}))
    assert layer.change is not None
    with torch.no_grad():
        layer.change += 1
    with pytest.raises(FormatError, match="infinity"):
        layer.settle()


def test_the_command_line(cli: Cli, quantized: Callable[[str], Path], original: Path, text_file: Path) -> None:
    words = ("tune", quantized("gptq"), "--base", original, "--calibration", text_file, "--rows", 4, "--length", 16)
    made = cli(*words, "--steps", 4, "--out", "tuned", "--json", "-")
    assert made.code == 0, made.err
    result = json.loads(made.out)
    assert result["schema_version"] == "neoquant.tuning/1" and result["steps"] == 4
    assert result["loss"]["after"] < result["loss"]["before"]
    assert "4 steps" in made.err and "neoquant compare" in made.err
    assert "choose another name" in cli(*words, "--out", "tuned").error
    assert "--base" in cli("tune", quantized("gptq"), "--calibration", text_file).error
    assert "--calibration" in cli("tune", quantized("gptq"), "--base", original).error
    assert "0 rows" in cli(*words[:6], "--rows", 0, "--out", "x").error
    assert "nothing.jsonl" in cli(*words[:5], "nothing.jsonl", "--out", "x").error
