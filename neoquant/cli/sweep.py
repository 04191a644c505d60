"""`neoquant sweep`: a grid of models x recipes x suites, quantized and compared into one folder."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neoquant.cli import options
from neoquant.cli.evaluation import load_contestant, own_device, team_of
from neoquant.cli.models import short_name
from neoquant.cli.terminal import Terminal
from neoquant.errors import DataError, NeoquantError, OutputError

if TYPE_CHECKING:
    from neoquant.evaluation import Comparison
    from neoquant.evaluation.team import Team

FIELDS = {"models": list, "suites": list, "recipes": dict, "documents": int, "context": int}
STATE = "sweep.json"
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def sweep(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What to measure: a TOML file.")],
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Everything that is made; given again, it goes on.")
    ],
    device: options.Device = None,
    dtype: options.Dtype = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Quantize models by recipes and compare them with their originals on suites.

    The file names models, suites (as for --suite) and recipes, each with the options of neoquant quantize;
    documents and context, if given, are those of neoquant compare:

    \b
      models = ["EleutherAI/gpt-neo-125m", "EleutherAI/gpt-neo-1.3B"]
      suites = ["pile-core", "wikitext2"]
      [recipes]
      nf4 = "--bits 4 --type nf4"
      gptq3 = "--bits 3 --type gptq --calibration pile"

    FOLDER gets models/, results/ (a JSON for every model and suite) and table.md. What is done already is not
    done again: after an interruption, or with recipes added to the file, the same command goes on. Under
    torchrun the processes share each comparison.
    """
    terminal: Terminal = ctx.obj
    wanted = read_sweep(file)
    try:
        for folder in ("models", "results"):
            (out / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror}") from error
    results: list[Comparison] = []
    with team_of(terminal) as team:
        for model in wanted["models"]:
            made = {}
            for name, words in wanted["recipes"].items():
                made[name] = out / "models" / f"{short_name(model)}-{name}"
                failure = None
                if team.rank == 0:
                    failure = _quantize(model, words, made[name], out, terminal)
                if reason := team.share(failure)[0]:  # all end where the first one does
                    raise NeoquantError(f"recipe {name} of {model}: {reason}")
            for suite in wanted["suites"]:
                results.append(_compare(model, made, suite, wanted, out, team, terminal, device, dtype))
        if team.rank:
            return

    from neoquant.report.table import summary_table

    for result in results:
        terminal.show(f"{result.reference.model.name} on {result.reference.suite.name}", summary_table(result), "")
    _write(out / "table.md", table(results))
    terminal.note(f"wrote {out / 'table.md'}")


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
    _remember(out, key, fingerprint)
    return None


def _compare(
    model: str,
    made: dict[str, Path],
    suite: str,
    wanted: dict[str, Any],
    out: Path,
    team: Team,
    terminal: Terminal,
    device: str | None,
    dtype: str | None,
) -> Comparison:
    """The comparison of one model on one suite: what is there, and in one pass what is missing."""
    from neoquant.evaluation import Comparison, compare, load_suite

    chosen = load_suite(suite).override(documents=wanted.get("documents"), context=wanted.get("context"))
    file = out / "results" / f"{short_name(model)}-{chosen.name}.json"
    key = f"results/{file.stem}"
    state = _state(out)
    fingerprint = _fingerprint(
        chosen.model_dump_json(), dtype, *(f"{n} {state[f'models/{p.name}']}" for n, p in made.items())
    )
    if team.share(file.is_file() and state.get(key) == fingerprint)[0]:
        return Comparison.from_json(file.read_text(encoding="utf-8"))
    terminal.note(f"comparing {short_name(model)} on {chosen.name}")
    device = own_device(device, team)
    reference, tokenizer = load_contestant(model, terminal, "sweep", revision=None, device=device, dtype=dtype)
    others = [
        load_contestant(str(path), terminal, "sweep", revision=None, device=device, dtype=dtype)[0]
        for path in made.values()
    ]
    result = compare(
        reference, others, tokenizer, chosen, progress=terminal.progress, journal=Path(f"{file}.partial"), team=team
    )
    if team.rank == 0:
        _write(file, result.to_json() + "\n")
        _remember(out, key, fingerprint)
    return result


def table(results: list[Comparison]) -> str:
    """Markdown: a line for every candidate."""
    lines = [
        "| model | suite | MB | bits/weight | bits/byte | perplexity | Δ nats/token [95 %] | top-1 | KL |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --: |",
    ]

    from neoquant.report.words import agreement, change_interval, divergence, number, perplexity

    for result in results:
        rows = [(result.reference, None), *((c.evaluation, c.total) for c in result.candidates)]
        for evaluation, change in rows:
            size = "" if evaluation.model.bytes_on_disk is None else f"{evaluation.model.bytes_on_disk / 1e6:,.1f}"
            cells = [
                *(evaluation.model.name, evaluation.suite.name, size, number(evaluation.model.bits_per_weight_model)),
                *(f"{evaluation.total.bits_per_byte:.4f}", perplexity(evaluation.total)),
                *((change_interval(change), agreement(change), divergence(change.kl)) if change else ("", "", "")),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _fingerprint(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _state(out: Path) -> dict[str, str]:
    """What is done: folder or result -> fingerprint of what it was made from."""
    try:
        found = json.loads((out / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(out: Path, key: str, fingerprint: str) -> None:
    _write(out / STATE, json.dumps(_state(out) | {key: fingerprint}, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    """The whole file or none of it."""
    new = Path(f"{path}.new")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error
