"""`neoquant push`: send a model folder to the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from neoquant.cli import options
from neoquant.cli.output import check_output_file, json_kind, write_text
from neoquant.cli.terminal import Terminal
from neoquant.sizes import plural, size


def push(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model folder, with its card README.md.")],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="The model on the hub; created if it is not there.")],
    private: Annotated[
        bool, typer.Option("--private", help="Create it private. Refused if a public one of that name exists.")
    ] = False,
    gated: Annotated[
        str | None,
        typer.Option("--gated", metavar="HOW", help="Require a request for access: auto (granted at once) or manual."),
    ] = None,
    revision: Annotated[
        str, typer.Option("--revision", metavar="BRANCH", help="Branch; created from main if it does not exist.")
    ] = "main",
    message: Annotated[
        str | None, typer.Option("--message", "-m", metavar="TEXT", help="Commit message.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be sent.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write what was sent to FILE.")
    ] = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Send a model to the hub in one atomic commit: others see the old model or the new one.

    Sends weights, configuration, tokenizer, licence, model card and neoquant's records, nothing else. Uses the token in
    HF_TOKEN, or the one that `hf auth login` stored.

    \b
    Examples:
      neoquant push gpt-neo-1.3B-nf4 me/gpt-neo-1.3B-nf4 --dry-run
      neoquant push gpt-neo-1.3B-nf4 me/gpt-neo-1.3B-nf4 --private
      neoquant push gpt-neo-gptq me/gpt-neo-1.3B --revision gptq-4bit
    """
    from neoquant.checkpoint.upload import push as send

    terminal: Terminal = ctx.obj
    check_output_file(json_file, json_kind("push"), terminal, inputs=[folder], force=force)
    sent = send(
        folder,
        repo,
        private=private,
        gated=gated,
        revision=revision,
        message=message,
        dry_run=dry_run,
        progress=terminal.progress,
    )
    if json_file is not None:
        written = {"schema_version": "neoquant.push/1", **sent.to_dict()}
        write_text(json_file, json.dumps(written, indent=1) + "\n", terminal)
    terminal.show(*(f"{size(count):>12}  {name}" for name, count in sent.files.items()))
    total = f"{plural(len(sent.files), 'file')}, {size(sum(sent.files.values()))}"
    if dry_run:
        terminal.show(f"{total} for {repo} at {revision} (dry run: nothing was sent)")
    else:
        terminal.show(f"{total}: {sent.url}")
    if sent.left_out:
        terminal.note(f"note: left out, since no part of the model: {', '.join(sent.left_out)}")
    if sent.removed:
        terminal.note(f"note: removed on the hub, replaced by the new weights: {', '.join(sent.removed)}")
