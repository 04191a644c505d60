"""`neoquant sweep`: a grid of models x recipes x suites, quantized and compared into one folder."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from neoquant.cli import options
from neoquant.cli.evaluation import LoadOptions, journal_path, load_evaluated_model
from neoquant.cli.models import short_name
from neoquant.cli.processes import process_group_of
from neoquant.cli.progress_lines import run_with_progress
from neoquant.cli.sweep_file import BEGUN, SweepRecord, fingerprint, read_sweep
from neoquant.cli.terminal import Terminal
from neoquant.errors import NeoquantError, OutputError, RequestError
from neoquant.files.writing import write_file

if TYPE_CHECKING:
    from neoquant.distributed import ProcessGroup
    from neoquant.evaluation import Comparison, Suite

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class _Run(NamedTuple):
    """What holds for a whole sweep."""

    out: Path
    record: SweepRecord
    group: ProcessGroup
    terminal: Terminal
    loading: LoadOptions


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
    loading = LoadOptions.of(ctx.params)
    wanted = read_sweep(file)
    try:
        for folder in ("models", "results"):
            (out / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror}") from error
    record = SweepRecord(out)
    _say_what_is_done(wanted, record, terminal)
    with process_group_of(terminal) as group:
        run = _Run(out, record, group, terminal, loading)
        try:
            results = [result for model in wanted["models"] for result in _sweep_model(model, wanted, run)]
        except KeyboardInterrupt as error:
            reason = error.args or (f"the same command resumes from what is in {out}",)
            raise type(error)(*reason) from error
        if group.rank:
            return

    from neoquant.report.sweep import sweep_pages, sweep_table
    from neoquant.report.table import summary_table

    for result in results:
        terminal.show(f"{result.reference.model.name} on {result.reference.suite.name}", summary_table(result), "")
    for name, text in {"table.md": sweep_table(results), **sweep_pages(results)}.items():
        record.claim(name)
        write_file(out / name, text)
        terminal.note(f"wrote {out / name}")


def _say_what_is_done(wanted: Mapping[str, Any], record: SweepRecord, terminal: Terminal) -> None:
    done = record.read()
    quantized = [f"models/{short_name(model)}-{name}" for model in wanted["models"] for name in wanted["recipes"]]
    if found := sum(done.get(key, BEGUN) != BEGUN for key in quantized):
        terminal.note(f"resuming from {record.out}: {found} of {len(quantized)} models are quantized")


def _sweep_model(model: str, wanted: Mapping[str, Any], run: _Run) -> Iterator[Comparison]:
    """Quantize one model by every recipe, then compare on every suite."""
    from neoquant.evaluation import load_suite

    made = []
    for name, words in wanted["recipes"].items():
        made.append(run.out / "models" / f"{short_name(model)}-{name}")
        failure = None
        if run.group.rank == 0:
            failure = _quantize(model, words, made[-1], run.record, run.terminal)
        if reason := run.group.all_gather(failure)[0]:  # all end where the first one does
            raise NeoquantError(f"recipe {name} of {model}: {reason}")
    for name in wanted["suites"]:
        suite = load_suite(name).override(documents=wanted.get("documents"), context=wanted.get("context"))
        if result := _compare(model, made, suite, run):
            yield result


def _quantize(model: str, words: str, folder: Path, record: SweepRecord, terminal: Terminal) -> str | None:
    """Quantize unless exactly this was done; the reason if it failed. A process of its own gives its memory back."""
    key = f"models/{folder.name}"
    asked = fingerprint(model, words)
    if folder.is_dir() and record.read().get(key) == asked:
        return None
    record.claim(key)
    terminal.note(f"quantizing {folder.name}")
    command = [sys.executable, "-m", "neoquant", "quantize", model, *shlex.split(words), "--out", str(folder)]
    environment = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    code, errors = run_with_progress([*command, "--force"], environment, terminal.progress)
    if code:
        return errors.strip().splitlines()[-1].removeprefix("error: ") if errors.strip() else f"exit code {code}"
    record.add({key: asked})
    return None


def _compare(model: str, made: Sequence[Path], suite: Suite, run: _Run) -> Comparison | None:
    """One model on one suite: what is saved, and in one pass what is missing. None in all processes but the first."""
    file = run.out / "results" / f"{short_name(model)}-{suite.name}.json"
    state = run.record.read()
    keys = {path.name: f"results/{file.stem}/{path.name}" for path in made}
    asked = {
        keys[path.name]: fingerprint(suite.model_dump_json(), run.loading.dtype, model, state[f"models/{path.name}"])
        for path in made
    }
    saved = None
    if run.group.rank == 0:
        saved = _saved(file, {name for name, key in keys.items() if state.get(key) == asked[key]})
    there = run.group.all_gather({c.evaluation.model.name for c in saved.candidates} if saved else set())[0]
    missing = [path for path in made if path.name not in there]
    if missing and run.group.rank == 0:
        run.record.claim(f"results/{file.name}")
    result = _score(model, missing, suite, file, run) if missing else saved
    if missing and there:
        result = _joined(saved, result)
        if not run.group.all_gather(result is not None)[0]:
            run.terminal.note(f"{file} was measured with another base, text or arithmetic: comparing all anew")
            result = _score(model, made, suite, file, run)
    if run.group.rank or result is None:
        return None
    from neoquant.evaluation.journal import remove_journal

    by_name = {candidate.evaluation.model.name: candidate for candidate in result.candidates}
    result = result.model_copy(update={"candidates": tuple(by_name[name] for name in keys)})
    if missing:
        write_file(file, result.to_json() + "\n")
        run.record.add(asked)
        remove_journal(journal_path(file))
    return result


def _saved(file: Path, names: Collection[str]) -> Comparison | None:
    """The saved comparison, with those of its candidates that are named; None where there is none of them."""
    from neoquant.evaluation import Comparison
    from neoquant.evaluation.saved_results import read_result

    if not names or not file.is_file():
        return None
    result = read_result(file)
    if not isinstance(result, Comparison):
        return None
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
    loading = run.loading.within(run.group)
    (reference, tokenizer), *others = (
        load_evaluated_model(source, run.terminal, "sweep", loading) for source in (model, *map(str, made))
    )
    return compare(
        reference,
        [entry for entry, _ in others],
        tokenizer,
        suite,
        progress=run.terminal.progress,
        journal=journal_path(file),
        process_group=run.group,
    )
