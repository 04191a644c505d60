"""A sweep makes one folder of results, goes on where it stopped, and does nothing twice."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Cli
from hub_stand_in import StandIn

from neoquant.cli import sweep
from neoquant.cli.sweep_file import read_sweep
from neoquant.evaluation import Comparison
from neoquant.report.verdict import headline

SWEEP = """
models = ["{model}"]
suites = ["{suite}"]
[recipes]
int8 = "--type int8"
{more}
"""


@pytest.fixture
def write(tmp_path: Path, tiny_model: Path, text_file: Path) -> Callable[..., Path]:
    suite = tmp_path / "mine.toml"
    suite.write_text(f'name = "mine"\ncontext = 16\n[data]\nkind = "file"\npath = "{text_file}"\n')

    def make(more: str = "", text: str = SWEEP) -> Path:
        path = tmp_path / "sweep.toml"
        path.write_text(text.format(model=tiny_model, suite=suite, more=more))
        return path

    return make


def test_a_sweep(cli: Cli, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import neoquant.evaluation

    compared: list[list[str]] = []
    real = neoquant.evaluation.compare

    def compare(reference: Any, others: Any, *arguments: Any, **options: Any) -> Comparison:
        compared.append([other.describe.name for other in others])
        return real(reference, others, *arguments, **options)

    monkeypatch.setattr(neoquant.evaluation, "compare", compare)
    first = cli("sweep", write(), "--out", "swept")
    assert first.code == 0, first.err
    assert "tiny-neo-int8" in first.out and "tiny-neo on mine" in first.out
    results = Path("swept/results/tiny-neo-mine.json")
    before = results.read_bytes()
    assert cli("sweep", write(), "--out", "swept").out == first.out
    assert results.read_bytes() == before and compared == [["tiny-neo-int8"]]

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    two = write('nf4 = "--bits 4 --type nf4"')
    with monkeypatch.context() as patch:
        patch.setattr(neoquant.evaluation, "compare", interrupt)
        assert cli("sweep", two, "--out", "swept").code == 130
    quantized = Path("swept/models/tiny-neo-nf4/config.json").stat().st_mtime_ns
    assert cli("sweep", two, "--out", "swept").code == 0
    assert Path("swept/models/tiny-neo-nf4/config.json").stat().st_mtime_ns == quantized
    assert compared[1:] == [["tiny-neo-nf4"]]  # what was there is not run again
    both = Comparison.from_json(results.read_text())
    names = [candidate.evaluation.model.name for candidate in both.candidates]
    assert names == ["tiny-neo-int8", "tiny-neo-nf4"]
    assert both.candidates[0] == Comparison.from_json(before.decode()).candidates[0]
    table = Path("swept/table.md").read_text()
    assert len(table.splitlines()) == 5 and "| tiny-neo-nf4 | mine |" in table
    assert headline(both) in Path("swept/report.html").read_text()
    assert not list(Path("swept").rglob("*.partial"))
    assert cli("sweep", write(), "--out", "swept").code == 0 and len(compared) == 2  # a recipe taken out
    assert len(Path("swept/table.md").read_text().splitlines()) == 4

    # a base that scores otherwise than it did cannot stand for both
    text = results.read_text().replace(str(both.reference.units[0].nats), "1.5")
    results.write_text(text)
    again = cli("sweep", write('fp4 = "--type fp4"'), "--out", "swept")
    assert "comparing all anew" in again.err
    assert compared[2:] == [["tiny-neo-fp4"], ["tiny-neo-int8", "tiny-neo-fp4"]]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("[recipes]", "", "recipes names nothing"),
        ("suites = [", "suite = [", r"suite = \['mine'\]; legal are models \(list\), suites"),
        ('"{suite}"', '"nowhere"', "no suite 'nowhere'"),
        ('models = ["{model}"]', "models = [1]", "not a string"),
        ("models = [", 'models = ["{model}", ', "two models are called tiny-neo"),
        ("models", "models models", "sweep.toml: "),
    ],
)
def test_what_is_no_sweep(cli: Cli, write: Callable[..., Path], old: str, new: str, reason: str) -> None:
    text = SWEEP.replace(old, new).replace('int8 = "--type int8"', "" if "recipes" in old else 'int8 = "--type int8"')
    text = text.replace('suite = ["{suite}"]', "suite = ['mine']")
    assert re.search(reason, cli("sweep", write(text=text), "--out", "swept").error)
    assert not Path("swept").exists()


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ('bad = "--bits 5 --type nf4"', "recipe bad: "),
        ('bad = "--type \'nf4"', "recipe bad: .* cannot be split into words: No closing quotation"),
        ('bad = "--nonsense"', "recipe bad: .*nonsense"),
        ('bad = "other-model"', "recipe bad: .*extra argument"),
        ('bad = "--out elsewhere"', "recipe bad: --out cannot be given"),
        ('bad = "--calibration nowhere"', "recipe bad: calibration 'nowhere'"),
        (
            '"/../../../victim" = "--type nf4"',
            r"called .*victim., which cannot be part of a path",
        ),
        ('".." = "--type nf4"', r"the recipe is called '\.\.'"),
        ('"" = "--type nf4"', "the recipe is called ''"),
    ],
)
def test_a_recipe_is_checked_before_any_work(cli: Cli, write: Callable[..., Path], recipe: str, reason: str) -> None:
    result = cli("sweep", write(recipe), "--out", "swept")
    assert re.search(reason, result.error) and not Path("swept").exists()


def test_a_sweep_replaces_only_what_it_made(cli: Cli, write: Callable[..., Path], tiny_model: Path) -> None:
    """A folder, a result and a table that were there before, and a record that is none."""
    shutil.copytree(tiny_model, "swept/models/tiny-neo-int8")
    mine = Path("swept/models/tiny-neo-int8/model.safetensors").read_bytes()
    refused = cli("sweep", write(), "--out", "swept")
    assert refused.code == 1 and "tiny-neo-int8 was not made by this sweep" in refused.error
    assert Path("swept/models/tiny-neo-int8/model.safetensors").read_bytes() == mine
    shutil.rmtree("swept/models/tiny-neo-int8")
    Path("swept/table.md").write_text("mine")
    assert "table.md was not made by this sweep" in cli("sweep", write(), "--out", "swept").err
    assert Path("swept/table.md").read_text() == "mine"
    Path("swept/table.md").unlink()
    changed = cli("sweep", write('int8x = "--type int8"'), "--out", "swept")
    assert changed.code == 0 and "resuming from swept: 1 of 2 models are quantized" in changed.err
    Path("swept/sweep.json").write_text("[1]")
    assert "sweep.json is not the record of a sweep" in cli("sweep", write(), "--out", "swept").error


def test_the_sweeps_that_come_along_can_be_read() -> None:
    folder = Path(__file__).resolve().parents[2] / "eval" / "sweeps"
    assert [sweep.read_sweep(path)["models"] for path in folder.glob("*.toml")]


def test_the_sweep_of_the_published_models_runs_on_small_ones_under_their_names(
    cli: Cli, bare_hub: StandIn, text_file: Path, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its models come from a hub; one of its recipes, and texts of this machine in the place of the Pile."""
    stated = read_sweep(REPOSITORY / "eval" / "sweeps" / "gpt-neo.toml")
    assert stated["suites"] == ["pile-core"] and len(stated["recipes"]) == 6
    for name in stated["models"]:
        folder = make_model(name.replace("/", "-"), seed=len(name), dtype="float16")
        bare_hub.repos[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
    # Each model is quantized by a process of its own, which is told of the hub by the environment.
    monkeypatch.setenv("HF_ENDPOINT", bare_hub.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(Path("cache").resolve()))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    suite = f'name = "mine"\ncontext = 16\n[data]\nkind = "file"\npath = "{text_file}"\n'
    Path("mine.toml").write_text(suite)
    ours = f"--calibration {text_file} --rows 2 --length 16"
    words = stated["recipes"]["gptq2"].replace("--calibration pile", ours)
    Path("sweep.toml").write_text(
        f'models = {stated["models"]}\nsuites = ["mine.toml"]\n[recipes]\ngptq2 = {json.dumps(words)}\n'
    )
    result = cli("sweep", "sweep.toml", "--out", "swept")
    assert result.code == 0, result.err
    table = Path("swept/table.md").read_text()
    for name in stated["models"]:
        short = name.rpartition("/")[2]
        assert f"| {short}-gptq2 | mine |" in table
        saved = Comparison.from_json(Path(f"swept/results/{short}-mine.json").read_text())
        assert saved.reference.model.name == short and saved.candidates[0].evaluation.model.name == f"{short}-gptq2"
