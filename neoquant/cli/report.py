"""`neoquant report`: saved results for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from neoquant.cli import options
from neoquant.cli.output import (
    MARKDOWN,
    PAGE,
    check_different,
    check_output_file,
    check_writable,
    is_stdout,
    write_text,
)
from neoquant.cli.terminal import Terminal
from neoquant.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from neoquant.evaluation.result import Candidate, Comparison


def report(
    ctx: typer.Context,
    results: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Files that compare, inspect and bench wrote with --json."),
    ],
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write one page with charts, which needs no network.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Write tables for a README; - for the terminal.")
    ] = None,
    card: Annotated[
        list[Path] | None,
        typer.Option(
            "--card",
            metavar="FOLDER",
            help="Write the measured figures into this checkpoint's model card (README.md). Repeat for more.",
            show_default=False,
        ),
    ] = None,
    force: options.ForceReport = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Turn saved results into a page, Markdown or a model card; the terminal shows the table and the verdict.

    Comparisons of the same base, data and protocol become one. Speed and memory come from files of neoquant bench,
    scores on tasks from those of neoquant compare --task.
    The page quotes passages of the documents: share it only where the text may be shared.

    \b
    Examples:
      neoquant report loss.json --html loss.html
      neoquant report loss.json layers.json bench.json --html loss.html --markdown loss.md
      neoquant report loss.json --card gpt-neo-1.3B-nf4
    """
    terminal: Terminal = ctx.obj
    piped = is_stdout(markdown)
    inputs = [*results, *(card or ())]
    check_different(html, markdown)
    check_output_file(html, PAGE, terminal, inputs=inputs, force=force)
    if not piped:
        check_output_file(markdown, MARKDOWN, terminal, inputs=inputs, force=force)

    from neoquant.report.gather import gather
    from neoquant.report.layers import inspection_table
    from neoquant.report.markdown import MARK, markdown_report
    from neoquant.report.remarks import remarks
    from neoquant.report.table import comparison_table
    from neoquant.report.tasks import task_comparison_table
    from neoquant.report.verdict import verdict

    gathered = gather(results)
    cards = [(folder / "README.md", _card(folder, gathered.comparison, terminal)) for folder in card or ()]
    if piped:
        terminal.show(markdown_report(gathered.comparison, gathered.speed, gathered.tasks).rstrip())
    else:
        terminal.show(comparison_table(gathered.comparison, gathered.speed))
        for inspection in gathered.inspections:
            terminal.show("", inspection_table(inspection))
        for tasks in gathered.tasks:
            terminal.show("", task_comparison_table(tasks))
        terminal.show("", *(verdict(gathered.comparison), *remarks(gathered.comparison)))
    if html is not None:
        from neoquant.report.page import render_page

        write_text(html, render_page(gathered), terminal)
    if markdown is not None and not piped:
        text = markdown_report(gathered.comparison, gathered.speed, gathered.tasks)
        write_text(markdown, f"{MARK}\n{text}", terminal)
    for path, text in cards:
        write_text(path, text, terminal)


def _card(folder: Path, result: Comparison, terminal: Terminal) -> str:
    """The folder's model card with what was measured of it.

    Raises:
        CheckpointError: it is not a checkpoint's folder.
        RequestError: no candidate has its weights.
    """
    from neoquant.quantization.model_card import with_measured
    from neoquant.report.markdown import measured_block

    candidate = _measured(folder, result, terminal)
    path = folder / "README.md"
    check_writable(path)
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return with_measured(text, measured_block(result, candidate))


def _measured(folder: Path, result: Comparison, terminal: Terminal) -> Candidate:
    """The candidate whose weights lie in `folder`, by their hash."""
    from neoquant.checkpoint import open_checkpoint
    from neoquant.cli.describe import hash_weights

    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: --card takes the folder of a checkpoint")
    with open_checkpoint(folder, progress=terminal.progress) as checkpoint:
        sha256 = hash_weights(checkpoint, terminal.progress)
    for candidate in result.candidates:
        if candidate.evaluation.model.sha256 == sha256:
            return candidate
    names = ", ".join(candidate.evaluation.model.name for candidate in result.candidates)
    raise RequestError(f"{folder} is none of the measured models ({names}): the sha256 of its weights is {sha256[:12]}")
