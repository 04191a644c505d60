"""`neoquant generate --task`: labels of texts, or answers found in them, a line of JSON each."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neoquant.cli.models import Loading
from neoquant.cli.terminal import Terminal
from neoquant.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from neoquant.hf.pipelines import Pipeline


def run_task(
    task: str, source: str | Path, text: str, question: str | None, loading: Loading, terminal: Terminal
) -> None:
    """Print the task's result for each line of `text`, in order; null for a blank one, so that outputs line up.

    Raises RequestError for a question without question-answering, or the other way, or an unknown task.
    """
    from neoquant.hf.pipelines import ALIASES

    lines = text.split("\n")
    inputs: list[Any] = [line for line in lines if line.strip()]
    if ALIASES.get(task, task) == "question-answering":
        if question is None:
            raise RequestError("question-answering needs a question: give --question TEXT")
        inputs = [{"question": question, "context": line} for line in inputs]
    elif question is not None:
        raise RequestError("--question belongs to --task question-answering")
    results = iter(_trained(task, source, loading)(inputs) if inputs else ())
    for line in lines:
        terminal.show(json.dumps(next(results) if line.strip() else None, ensure_ascii=False))


def _trained(task: str, source: str | Path, loading: Loading) -> Pipeline:
    """The pipeline of a model that has the task's head.

    Raises CheckpointError for one that has none: its answers would be drawn at random.
    """
    from neoquant.hf.pipelines import pipeline
    from neoquant.loading.fill import LoadWarning

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* has no weights for ", LoadWarning)
        made = pipeline(task, source, **loading._asdict())
    if missing := made.model.load_report.missing:
        raise CheckpointError(f"{source} has no weights for {', '.join(missing)}: it is not trained for {task}")
    return made
