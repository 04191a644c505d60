"""`neoquant sweep`: a grid of models x recipes x suites, quantized and compared into one folder."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from neoquant.cli import options
from neoquant.cli.evaluation import load_contestant, own_device, team_of
from neoquant.cli.models import short_name
from neoquant.cli.terminal import Terminal
from neoquant.errors import DataError, NeoquantError, OutputError, RequestError

if TYPE_CHECKING:
    from neoquant.evaluation import Comparison, Suite
    from neoquant.evaluation.distributed import Team

FIELDS = {"models": list, "suites": list, "recipes": dict, "documents": int, "context": int}
STATE = "sweep.json"
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class _Run(NamedTuple):
    """What holds for a whole sweep."""

    out: Path
    team: Team
    terminal: Terminal
    device: str | None
    dtype: str | None


def sweep(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What to measure: a TOML file.")],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Output folder. Run again with it to resume.")],
    device: options.Device = None,
    dtype: options.Dtype = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Quantize each model by each recipe, and compare the results with the original on each suite.

    The file names models, suites (as for --suite) and recipes, each with the options of neoquant quantize;
    documents and context, if given, are those of neoquant compare:

    \b
      models = ["EleutherAI/gpt-neo-125m", "EleutherAI/gpt-neo-1.3B"]
      suites = ["pile-core", "wikitext2"]
      [recipes]
      nf4 = "--bits 4 --type nf4"
      gptq3 = "--bits 3 --type gptq --calibration pile"

    FOLDER gets models/, results/ (a JSON for every model and suite), table.md and report.html, a page with the
    verdict (with several comparisons, an index of pages). The same command resumes an interrupted sweep, and
    after recipes are added to the file it runs only what is new. Under torchrun the processes share each
    comparison.
    """
    terminal: Terminal = ctx.obj
    wanted = read_sweep(file)
    try:
        for folder in ("models", "results"):
            (out / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror}") from error
    from neoquant.evaluation import load_suite

    results: list[Comparison] = []
    with team_of(terminal) as team:
        for model in wanted["models"]:
            made = []
            for name, words in wanted["recipes"].items():
                made.append(out / "models" / f"{short_name(model)}-{name}")
                failure = None
                if team.rank == 0:
                    failure = _quantize(model, words, made[-1], out, terminal)
                if reason := team.share(failure)[0]:  # all end where the first one does
                    raise NeoquantError(f"recipe {name} of {model}: {reason}")
            for name in wanted["suites"]:
                suite = load_suite(name).override(documents=wanted.get("documents"), context=wanted.get("context"))
                if result := _compare(model, made, suite, _Run(out, team, terminal, device, dtype)):
                    results.append(result)
        if team.rank:
            return

    from neoquant.report.sweep import sweep_pages, sweep_table
    from neoquant.report.table import summary_table

    for result in results:
        terminal.show(f"{result.reference.model.name} on {result.reference.suite.name}", summary_table(result), "")
    for name, text in {"table.md": sweep_table(results), **sweep_pages(results)}.items():
        _write(out / name, text)
        terminal.note(f"wrote {out / name}")


def read_sweep(path: Path) -> dict[str, Any]:
    """What a sweep's file says. Raises DataError for one that is none, RequestError for a suite that does not exist."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    from neoquant.evaluation import load_suite

    try:
        found: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from None
    for key, value in found.items():
        kind = FIELDS.get(key)
        if kind is None or not isinstance(value, kind):
            legal = ", ".join(f"{name} ({kind.__name__})" for name, kind in FIELDS.items())
            raise DataError(f"{path}: {key} = {value!r}; legal are {legal}")
    for key in ("models", "suites", "recipes"):
        if not found.get(key) or not all(
            isinstance(v, str) for v in (*found[key], *dict(found.get("recipes", {})).values())
        ):
            raise DataError(f"{path}: {key} names nothing, or something that is not a string")
    names = [short_name(model) for model in found["models"]]
    if len(set(names)) < len(names):
        raise DataError(f"{path}: two models are called {next(n for n in names if names.count(n) > 1)}")
    for suite in found["suites"]:
        load_suite(suite)
    return found


def _quantize(model: str, words: str, folder: Path, out: Path, terminal: Terminal) -> str | None:
    """Quantize unless exactly this was done; the reason if it failed. A process of its own gives its memory back."""
    key = f"models/{folder.name}"
    fingerprint = _fingerprint(model, words)
    if folder.is_dir() and _state(out).get(key) == fingerprint:
        return None
    terminal.note(f"quantizing {folder.name}")
    command = [sys.executable, "-m", "neoquant", "--quiet", "quantize", model, *shlex.split(words)]
    environment = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    done = subprocess.run(
        [*command, "--out", str(folder), "--force"], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return done.stderr.strip().removeprefix("error: ") or f"exit code {done.returncode}"
    _remember(out, {key: fingerprint})
    return None


def _compare(model: str, made: Sequence[Path], suite: Suite, run: _Run) -> Comparison | None:
    """One model on one suite: what is saved, and in one pass what is missing. None in all processes but the first."""
    file = run.out / "results" / f"{short_name(model)}-{suite.name}.json"
    state = _state(run.out)
    keys = {path.name: f"results/{file.stem}/{path.name}" for path in made}
    asked = {
        keys[path.name]: _fingerprint(suite.model_dump_json(), run.dtype, model, state[f"models/{path.name}"])
        for path in made
    }
    saved = None
    if run.team.rank == 0:
        saved = _saved(file, {name for name, key in keys.items() if state.get(key) == asked[key]})
    there = run.team.share({c.evaluation.model.name for c in saved.candidates} if saved else set())[0]
    missing = [path for path in made if path.name not in there]
    result = _score(model, missing, suite, file, run) if missing else saved
    if missing and there:
        result = _joined(saved, result)
        if not run.team.share(result is not None)[0]:
            run.terminal.note(f"{file} was measured with another base, text or arithmetic: comparing all anew")
            result = _score(model, made, suite, file, run)
    if run.team.rank or result is None:
        return None
    by_name = {candidate.evaluation.model.name: candidate for candidate in result.candidates}
    result = result.model_copy(update={"candidates": tuple(by_name[name] for name in keys)})
    if missing:
        _write(file, result.to_json() + "\n")
        _remember(run.out, asked)
    return result


def _saved(file: Path, names: Collection[str]) -> Comparison | None:
    """The saved comparison, with those of its candidates that are named; None where there is none of them."""
    from neoquant.evaluation import Comparison

    if not names or not file.is_file():
        return None
    result = Comparison.from_json(file.read_text(encoding="utf-8"))
    kept = tuple(candidate for candidate in result.candidates if candidate.evaluation.model.name in names)
    return result.model_copy(update={"candidates": kept}) if kept else None


def _joined(saved: Comparison | None, fresh: Comparison | None) -> Comparison | None:
    """Both in one; None where there are not two, or the base did not score exactly the same in both."""
    from neoquant.evaluation.saved_results import compare_saved

    if saved is None or fresh is None:
        return None
    try:
        return compare_saved([saved, fresh], ["what is saved", "what was missing"])
    except RequestError:
        return None


def _score(model: str, made: Sequence[Path], suite: Suite, file: Path, run: _Run) -> Comparison:
    """Run the base and the models of these folders side by side."""
    from neoquant.evaluation import compare

    run.terminal.note(f"comparing {short_name(model)} on {suite.name}: {', '.join(path.name for path in made)}")
    device = own_device(run.device, run.team)
    (reference, tokenizer), *others = (
        load_contestant(source, run.terminal, "sweep", revision=None, device=device, dtype=run.dtype)
        for source in (model, *map(str, made))
    )
    return compare(
        reference,
        [contestant for contestant, _ in others],
        tokenizer,
        suite,
        progress=run.terminal.progress,
        journal=Path(f"{file}.partial"),
        team=run.team,
    )


def _fingerprint(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _state(out: Path) -> dict[str, str]:
    """What is done: folder, or candidate in a result -> fingerprint of what it was made from."""
    try:
        found = json.loads((out / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(out: Path, done: Mapping[str, str]) -> None:
    _write(out / STATE, json.dumps({**_state(out), **done}, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    """The whole file or none of it."""
    new = Path(f"{path}.new")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error
