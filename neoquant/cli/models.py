"""Models as they are named on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from neoquant.cli.terminal import Terminal
from neoquant.demo import MODEL, is_shadowed, resolve
from neoquant.demo import NAME as BUNDLED
from neoquant.files import names


class Loading(NamedTuple):
    """The options that say how a model is loaded."""

    revision: str | None
    device: str | None
    dtype: str | None


def find_model(model: str | None, terminal: Terminal, verb: str) -> str | Path:
    """The folder or hub id to open: what was named, or the bundled model if it was, or if nothing was."""
    if model is None:
        terminal.note(
            f"no model named: using {BUNDLED}, which comes with neoquant "
            f"(for another: neoquant {verb} FOLDER or neoquant {verb} EleutherAI/gpt-neo-1.3B)"
        )
    if model == BUNDLED and is_shadowed():
        terminal.note(f"note: {BUNDLED} is the folder of that name here, not the model that comes with neoquant")
    return resolve(model)


def shown_name(source: str) -> str:
    """A source as a user names it."""
    return BUNDLED if source == str(MODEL) else source


def short_name(model: str | None) -> str:
    """What a model is called in results and in the names of folders made from it."""
    return BUNDLED if model is None else names.short_name(model)


def suite_for(model: str | None) -> str:
    """The suite to propose for a model: the bundled one knows little but Python."""
    return "demo" if model in (None, BUNDLED) else "pile-core"
