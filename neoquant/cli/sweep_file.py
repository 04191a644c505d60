"""What a sweep's file says, checked as far as it can be before any model is opened; and the sweep's record."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from neoquant.cli.models import short_name
from neoquant.cli.recipes import RecipeOptions, choose_recipe, refuse_idle_options
from neoquant.errors import DataError, NeoquantError, OutputError, locate
from neoquant.files.names import LEGAL_NAME, is_safe_name
from neoquant.files.reading import read_json, read_toml
from neoquant.files.writing import write_file

FIELDS = {"models": list, "suites": list, "recipes": dict, "documents": int, "context": int}
RECORD = "sweep.json"
BEGUN = "begun"
"""In the record: nothing was there before, so whatever is there now was made by this sweep."""

_DECIDED = {"model": "models", "out": "--out", "force": "its record", "dry_run": "nothing", "restart": "its record"}


def read_sweep(path: Path) -> dict[str, Any]:
    """What a sweep's file says.

    Raises DataError for a file that is none, a name that cannot be part of a path, or a recipe that cannot be carried
    out; RequestError for a suite that does not exist.
    """
    from neoquant.evaluation import load_suite

    found = read_toml(path, error=DataError)
    with locate(str(path)):
        for key, value in found.items():
            kind = FIELDS.get(key)
            if kind is None or not isinstance(value, kind):
                legal = ", ".join(f"{name} ({kind.__name__})" for name, kind in FIELDS.items())
                raise DataError(f"{key} = {value!r}; legal are {legal}")
        for key in ("models", "suites", "recipes"):
            if not found.get(key) or not all(
                isinstance(v, str) for v in (*found[key], *dict(found.get("recipes", {})).values())
            ):
                raise DataError(f"{key} names nothing, or something that is not a string")
        suites = [load_suite(name) for name in found["suites"]]
        for suite in suites:
            suite.override(documents=found.get("documents"), context=found.get("context"))
        _check_names(found, [suite.name for suite in suites])
        for name, words in found["recipes"].items():
            with locate(f"recipe {name}"):
                try:
                    check_recipe(words)
                except NeoquantError as error:
                    raise DataError(str(error)) from error
    return found


def _check_names(found: Mapping[str, Any], suites: list[str]) -> None:
    """Every name is safe in a path, and no two results get the same one."""
    models = [short_name(model) for model in found["models"]]
    for what, names in (("model", models), ("suite", suites), ("recipe", list(found["recipes"]))):
        for name in names:
            if not is_safe_name(name):
                raise DataError(f"the {what} is called {name!r}, which cannot be part of a path: {LEGAL_NAME}")
            if names.count(name) > 1:
                raise DataError(f"two {what}s are called {name}")
    for others in (list(found["recipes"]), suites):
        made = [f"{model}-{other}" for model, other in product(models, others)]
        if twice := next((name for name in made if made.count(name) > 1), None):
            raise DataError(f"two results would be called {twice}")


def check_recipe(words: str) -> None:
    """Raise NeoquantError where the options of `neoquant quantize` in `words` are not legal."""
    import typer

    from neoquant.cli import quantize
    from neoquant.cli.terminal import Terminal

    try:
        options = shlex.split(words)
    except ValueError as error:
        raise DataError(f"{words!r} cannot be split into words: {error}") from None
    app = typer.Typer(add_completion=False)
    app.command()(quantize.quantize)
    try:
        given = typer.main.get_command(app).make_context("quantize", ["MODEL", *options], obj=Terminal()).params
    except typer.Exit:
        raise DataError(f"{words!r} asks for help, expected options of neoquant quantize") from None
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's own, whichever version raised it
            raise
        raise DataError(str(error.format_message()).rstrip(".")) from None
    for option, decider in _DECIDED.items():
        if option != "model" and given[option] not in (None, False):
            raise DataError(f"--{option.replace('_', '-')} cannot be given: {decider} of the sweep decides it")
    if given["calibration"] is not None:
        from neoquant.calibration.dataset import calibration_suite

        calibration_suite(given["calibration"])
    refuse_idle_options(given, choose_recipe(RecipeOptions.of(given)))


def fingerprint(*parts: object) -> str:
    """A short hash of what something was made from."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


class SweepRecord:
    """What a sweep has made in its folder, and from what: path, or candidate in a result -> fingerprint."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def read(self) -> dict[str, str]:
        """Raises OutputError where the file is not a sweep's record: nothing there may be taken for the sweep's."""
        path = self.out / RECORD
        if not path.exists():
            return {}
        found = read_json(path, error=OutputError)
        if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
            raise OutputError(f"{path} is not the record of a sweep; name another folder")
        return found

    def add(self, done: Mapping[str, str]) -> None:
        write_file(self.out / RECORD, json.dumps({**self.read(), **done}, indent=1) + "\n")

    def claim(self, key: str) -> None:
        """Before `key`, a path in the folder, is written: refuse what this sweep did not make, else note that it does.

        Raises OutputError.
        """
        if key in self.read():
            return
        path = self.out / key
        if path.exists() or path.is_symlink():
            raise OutputError(
                f"{path} was not made by this sweep and would be replaced: move it, or name another --out"
            )
        self.add({key: BEGUN})
