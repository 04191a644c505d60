"""What `eval`, `compare` and `inspect` share: which text, which models, and what becomes of the result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from neoquant.cli.describe import calibrated_on, model_info
from neoquant.cli.generation import require_cache
from neoquant.cli.models import find_model, short_name, suite_for
from neoquant.cli.options import own_fields
from neoquant.cli.output import is_stdout, write_text
from neoquant.cli.terminal import Terminal
from neoquant.demo import NAME as BUNDLED
from neoquant.errors import RequestError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from neoquant.distributed import ProcessGroup
    from neoquant.evaluation import Comparison, EvaluatedModel, Evaluation, Suite
    from neoquant.evaluation.result import Record
    from neoquant.evaluation.thresholds import Condition
    from neoquant.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class SuiteOptions:
    """What `eval`, `compare` and `inspect` take to describe the text, as it was typed."""

    suite: str | None
    data: str | None
    subset: list[str] | None
    documents: int | None
    context: int | None
    protocol: str | None = None
    stride: int | None = None

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> SuiteOptions:
        """From the parameters of a verb by name, `typer.Context.params`."""
        return cls(**own_fields(cls, params))


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How models are loaded that an evaluation runs."""

    device: str | None
    dtype: str | None
    activations: str = "exact"
    cache: str | None = None

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> LoadOptions:
        """From the parameters of a verb by name, checked before any model is opened.

        Raises:
            RequestError: no model could be loaded like that, or the device is none, or is not there.
        """
        from neoquant.kernels import ACTIVATIONS
        from neoquant.model.devices import resolve_device
        from neoquant.model.dtypes import check_dtype

        made = cls(**own_fields(cls, params))
        check_dtype(made.dtype)
        require_cache(made.cache)
        if made.activations not in ACTIVATIONS:
            raise RequestError(f"activations are {made.activations!r}; legal are {' and '.join(ACTIVATIONS)}")
        if made.device is not None:
            resolve_device(made.device)
        return made

    def within(self, group: ProcessGroup) -> LoadOptions:
        """One of several processes on a machine takes the GPU of its own number, where there is one for each."""
        import torch

        if self.device is None and group.size > 1 and torch.cuda.device_count() >= group.local_size:
            return replace(self, device=f"cuda:{group.local_rank}")
        return self


def choose_suite(options: SuiteOptions, model: str | None) -> Suite:
    """The suite that the options describe: the named one, or the data alone, or the bundled model's own, `demo`.

    Raises:
        RequestError: there is neither a suite nor data, there is none of that name, or the values do not fit together.
        DataError: the file is not a suite.
    """
    from neoquant.evaluation import Suite, load_suite, suite_names

    name, data = options.suite, options.data
    overrides: dict[str, Any] = {
        "documents": options.documents,
        "protocol": options.protocol,
        "context": options.context,
        "stride": options.stride,
        "subsets": tuple(options.subset) if options.subset else None,
    }
    if name is None and data is not None:
        return Suite.of_file(data).override(**overrides)
    if name is None and model in (None, BUNDLED):
        name = suite_for(model)
    if name is None:
        raise RequestError(
            f"say what to evaluate on: --suite with one of {', '.join(suite_names())}, or a TOML file; or --data with "
            "a .jsonl, .jsonl.zst or .txt file"
        )
    return load_suite(name).override(file=data, **overrides)


FAILED = 3
"""The exit code where a condition of --fail-if holds."""


def is_result(name: str) -> bool:
    """Whether a name on the command line is a file that --json wrote, and not a model."""
    return name.endswith(".json")


def journal_of(json: Path | None) -> Path | None:
    """The journal of a result, if that goes to a file."""
    return None if json is None or is_stdout(json) else journal_path(json)


@contextmanager
def keeping_progress(json: Path | None) -> Iterator[Path | None]:
    """The journal of a result; an interruption says whether the same command goes on, or what would make it."""
    journal = journal_of(json)
    try:
        yield journal
    except KeyboardInterrupt as error:
        reason = "before anything was scored: the same command starts again"
        if journal is None:
            reason = "before the end: nothing is kept; with --json FILE the same command would resume"
        raise type(error)(*(error.args or (reason,))) from error


def journal_path(result: Path) -> Path:
    """Where what has been scored so far is kept, so that the same command goes on after an interruption."""
    return Path(f"{result}.partial")


def inputs_of(suite: Suite, suite_name: str | None, *models: str | None) -> list[str | None]:
    """The files and folders that an evaluation reads: no output may take their place."""
    from neoquant.data.suite import FileData

    data = suite.data
    return [suite_name, *([data.path] if isinstance(data, FileData) else []), *models]


def conditions_of(texts: list[str] | None, *, side_by_side: bool) -> list[Condition]:
    """The conditions of --fail-if. Raises RequestError, before the work, for what is none.

    One model alone (not `side_by_side`) has no figures that need two.
    """
    from neoquant.evaluation.thresholds import parse, require_scores

    conditions = [parse(text) for text in texts or ()]
    if not side_by_side:
        require_scores(conditions)
    return conditions


def fail_where(conditions: list[Condition], result: Evaluation | Comparison, terminal: Terminal) -> None:
    """Exit with FAILED, saying why, where a condition holds."""
    from neoquant.evaluation.thresholds import failures

    fail_with(failures(conditions, result), terminal)


def fail_with(lines: list[str], terminal: Terminal) -> None:
    """Exit with FAILED and these lines, if there are any: a condition holds in each."""
    for line in lines:
        terminal.say_last(f"failed: {line}")
    if lines:
        raise typer.Exit(FAILED)


def publish(
    result: Record,
    table: RenderableType,
    notes: Iterable[str],
    json: Path | None,
    terminal: Terminal,
) -> None:
    """Show the notes, each once, and the table; write the result to `json`, if that is asked for.

    The journal of the work goes only when the result is safe.
    """
    from neoquant.evaluation.journal import remove_journal

    if json is not None:
        write_text(json, result.to_json() + "\n", terminal)
        if journal := journal_of(json):
            remove_journal(journal)
    for note in dict.fromkeys(notes):
        terminal.note(f"note: {note}")
    terminal.show(table)


def load_evaluated_model(
    model: str | None,
    terminal: Terminal,
    verb: str,
    options: LoadOptions,
    revision: str | None = None,
) -> tuple[EvaluatedModel, Tokenizer]:
    """A model ready to run, what results say of it, and its tokenizer."""
    from neoquant.evaluation import EvaluatedModel
    from neoquant.evaluation.held_states import HeldStates
    from neoquant.loading.pretrained import load

    source = find_model(model, terminal, verb)
    info = model_info(source, revision, short_name(model), terminal.progress)
    network, tokenizer = load(
        source,
        revision=info.revision,
        device=options.device,
        dtype=options.dtype,
        activations=options.activations,
        progress=terminal.progress,
    )
    if (kind := options.activations) != "exact":
        info = info.model_copy(update={"name": f"{info.name} ({kind} activations)", "activations": kind})
    runs: Any = network
    if options.cache is not None:
        info = info.model_copy(update={"name": f"{info.name} ({options.cache} cache)"})
        runs = HeldStates(network, options.cache)
    return EvaluatedModel(runs, info, calibrated_on(source, info.revision, terminal.progress)), tokenizer


def load_compared_models(
    base: str, revision: str | None, models: list[str], options: LoadOptions, terminal: Terminal
) -> tuple[EvaluatedModel, list[EvaluatedModel], Tokenizer]:
    """The reference, the models made from it, and the tokenizer of the reference, which reads the text for all."""
    exact = replace(options, activations="exact", cache=None)
    reference, tokenizer = load_evaluated_model(base, terminal, "compare", exact, revision)
    others = []
    for model in models:
        other, own_tokenizer = load_evaluated_model(model, terminal, "compare", options)
        if own_tokenizer.sha256 != tokenizer.sha256:
            terminal.note(f"note: {model} comes with another tokenizer than {base}; both are read with that of {base}")
        others.append(other)
    return reference, others, tokenizer
