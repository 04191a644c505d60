"""`neoquant generate --task`: labels of texts, or answers found in them, a line of JSON each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from neoquant.cli.models import Loading
from neoquant.cli.terminal import Terminal
from neoquant.errors import RequestError


def run_task(
    task: str, source: str | Path, text: str, question: str | None, loading: Loading, terminal: Terminal
) -> None:
    """Print the task's result for each line of `text`, in order; null for a blank one, so that outputs line up.

    Raises RequestError for a question without question-answering, or the other way, or an unknown task.
    """
    from neoquant.hf.pipelines import ALIASES, pipeline

    lines = text.split("\n")
    inputs: list[Any] = [line for line in lines if line.strip()]
    if ALIASES.get(task, task) == "question-answering":
        if question is None:
            raise RequestError("question-answering needs a question: give --question TEXT")
        inputs = [{"question": question, "context": line} for line in inputs]
    elif question is not None:
        raise RequestError("--question belongs to --task question-answering")
    results = iter(pipeline(task, source, **loading._asdict())(inputs) if inputs else ())
    for line in lines:
        terminal.show(json.dumps(next(results) if line.strip() else None, ensure_ascii=False))
