"""From what was typed to what the library takes: models by name, recipes from options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neoquant.cli.terminal import Terminal
from neoquant.errors import RequestError

if TYPE_CHECKING:
    from neoquant.quantization.recipe import Recipe

BUNDLED = "neoquant-demo"
"""How the model that comes with neoquant is called on the command line."""


def find_model(model: str | None, terminal: Terminal, verb: str) -> str | Path:
    """The folder or hub id to open: what was named, or the bundled model if it was, or if nothing was."""
    from neoquant.demo import MODEL

    if model is None:
        terminal.note(
            f"no model named: using {BUNDLED}, which comes with neoquant "
            f"(for another: neoquant {verb} FOLDER or neoquant {verb} EleutherAI/gpt-neo-1.3B)"
        )
        return MODEL
    if model == BUNDLED and not Path(model).exists():
        return MODEL
    return model


def short_name(model: str | None) -> str:
    """The last part of a folder or hub id: `gpt-neo-1.3B` for `EleutherAI/gpt-neo-1.3B`."""
    if model is None:
        return BUNDLED
    return Path(model).resolve().name if Path(model).exists() else model.rpartition("/")[2]


def suite_for(model: str | None) -> str:
    """The suite to propose for a model: the bundled one knows little but Python."""
    return "demo" if model in (None, BUNDLED) else "pile-core"


def choose_recipe(
    *,
    bits: int | None,
    type: str | None,
    block_size: int | None,
    no_double_quant: bool,
    group_size: int | None,
    symmetric: bool,
    quantizer_options: Mapping[str, str | float | None],
    calibrated: bool = False,
    keep: list[str] | None,
    format: str | None,
    dtype: str | None,
    embeddings: str | None,
    recipe: str | None,
) -> Recipe:
    """The recipe that the options describe; options of a calibrated quantizer, or text for it, ask for it as well.

    Raises:
        RequestError: they contradict each other, or there is no such grid or recipe.
    """
    from neoquant.quantization.recipe import Recipe

    whatever = {"format": format, "dtype": dtype, "embeddings": embeddings}
    stated: dict[str, Any] = {key: value for key, value in whatever.items() if value is not None}
    stated_options: dict[str, Any] = {name: value for name, value in quantizer_options.items() if value is not None}
    if recipe is not None:
        grid = {
            "--bits": bits,
            "--type": type,
            "--block-size": block_size,
            "--no-double-quant": no_double_quant or None,
            "--group-size": group_size,
            "--symmetric": symmetric or None,
            **{f"--{name}": value for name, value in stated_options.items()},
        }
        extra = [option for option, value in grid.items() if value is not None]
        if extra:
            raise RequestError(f"--recipe decides the grids, so {', '.join(extra)} cannot be given with it")
        whole = Recipe.load(recipe).model_dump(exclude_unset=True)
        return Recipe.parse({**whole, **stated}).keeping(keep or (), "--keep")
    quantizer = "gptq" if calibrated or stated_options or type == "gptq" else None
    if type == "gptq":
        bits, type = 4 if bits is None else bits, "affine"
    bits, type = _complete(bits, type)
    return Recipe.simple(
        bits,
        type,
        block_size=block_size,
        double_quant=False if no_double_quant else None,
        group_size=group_size,
        symmetric=symmetric or None,
        quantizer=quantizer,
        **stated,
        **stated_options,
    ).keeping(keep or (), "--keep")


def _complete(bits: int | None, type: str | None) -> tuple[int, str]:
    """Bits and type where only one of them, or neither, is named; an illegal pair is passed on to be refused."""
    from neoquant.grids import legal_pairs

    for pair in ((4, "nf4"), (8, "int8"), (4, "affine"), *sorted(legal_pairs())):
        if bits in (None, pair[0]) and type in (None, pair[1]):
            return pair
    return 4 if bits is None else bits, type or "nf4"
