"""`neoquant push`: send a model folder to the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from neoquant.cli import options
from neoquant.cli.output import check_writable, size_text, write_text
from neoquant.cli.terminal import Terminal


def push(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model folder, with its card README.md.")],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="The model on the hub; made if it is not there.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make it private; a public one of that name is refused.")
    ] = False,
    gated: Annotated[
        str | None,
        typer.Option(
            "--gated", metavar="HOW", help="People must ask for access: auto (they get it at once) or manual."
        ),
    ] = None,
    revision: Annotated[
        str, typer.Option("--revision", metavar="BRANCH", help="Branch, made from main if it is not there.")
    ] = "main",
    message: Annotated[
        str | None, typer.Option("--message", "-m", metavar="TEXT", help="Of the commit.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be sent, and ask nobody.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write what was sent to FILE.")
    ] = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Send a model to the hub in one commit: what is there is the old model or the new one.

    Weights, configuration, tokenizer, licence, card and neoquant's records are sent, nothing else. The token
    is HF_TOKEN's, or the one that `hf auth login` stored.

    \b
    Examples:
      neoquant push gpt-neo-1.3B-nf4 me/gpt-neo-1.3B-nf4 --dry-run
      neoquant push gpt-neo-1.3B-nf4 me/gpt-neo-1.3B-nf4 --private
      neoquant push gpt-neo-gptq me/gpt-neo-1.3B --revision gptq-4bit
    """
    from neoquant.checkpoint.upload import push as send

    terminal: Terminal = ctx.obj
    check_writable(json_file)
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
    terminal.show(*(f"{size_text(size):>12}  {name}" for name, size in sent.files.items()))
    total = f"{len(sent.files)} files, {size_text(sum(sent.files.values()))}"
    if dry_run:
        terminal.show(f"{total}, to {repo} at {revision} (not sent: this was a dry run)")
    else:
        terminal.show(f"{total}: {sent.url}")
    if sent.left_out:
        terminal.note(f"note: no part of the model, so left out: {', '.join(sent.left_out)}")
    if sent.removed:
        terminal.note(f"note: removed on the hub, because the new weights take their place: {', '.join(sent.removed)}")
    if json_file is not None:
        write_text(json_file, json.dumps(sent.to_dict(), indent=1, sort_keys=True) + "\n", terminal)
