"""The recipes that come with neoquant: each loads, plans on every real size, and stands in the table as it is."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import pytest
from conftest import REPOSITORY
from shapes import SIZES, checkpoint_of

from neoquant.quantization.plan import Plan, make_plan
from neoquant.quantization.recipe import Recipe, recipe_names
from neoquant.quantizers import QUANTIZERS

FOLDER = REPOSITORY / "recipes"


@functools.cache
def recipe_rows() -> ModuleType:
    """The script that prints a row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "eval")
        return importlib.import_module("recipe_rows")


def plans(name: str) -> dict[str, Plan]:
    return {size: make_plan(checkpoint_of(config), Recipe.load(name)) for size, config in SIZES.items()}


def test_every_file_is_found_by_name() -> None:
    assert recipe_names() == sorted(path.stem for path in FOLDER.glob("*.toml"))
    assert recipe_names()


@pytest.mark.parametrize("name", recipe_names())
def test_recipe(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.description
    planned = plans(name)
    sizes = [f"{plan.weights_bytes / 1e6:,.0f}" for plan in planned.values()]
    plan = planned["1.3b"]
    common = {"bitsandbytes": "yes", "gptq": "with GPTQModel"}.get(plan.format.family, "no")
    row = f"| [{name}]({name}.toml) | {plan.bits_per_weight_linears:.2f} | {' | '.join(sizes)} | {common} |"
    assert row in (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    assert recipe_rows().row(name) == row


def test_every_quantizer_has_a_recipe() -> None:
    used = {rule.quantizer for name in recipe_names() for rule in Recipe.load(name).rules if not rule.keep}
    assert used == set(QUANTIZERS)
