"""A model and its tokenizer behind one call, from text to plain values: what transformers' pipelines return."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from neoquant.errors import RequestError
from neoquant.hf.pipelines.base import Pipeline
from neoquant.hf.pipelines.question_answering import QuestionAnsweringPipeline
from neoquant.hf.pipelines.text_classification import TextClassificationPipeline
from neoquant.hf.pipelines.text_generation import TextGenerationPipeline
from neoquant.hf.pipelines.token_classification import TokenClassificationPipeline
from neoquant.loading.pretrained import PreTrainedModel
from neoquant.tokenizer.tokenizer import Tokenizer

TASKS: dict[str, type[Pipeline]] = {
    "text-generation": TextGenerationPipeline,
    "text-classification": TextClassificationPipeline,
    "token-classification": TokenClassificationPipeline,
    "question-answering": QuestionAnsweringPipeline,
}
ALIASES = {"sentiment-analysis": "text-classification", "ner": "token-classification"}

__all__ = ["ALIASES", "TASKS", "Pipeline", "pipeline"]


def require_task(task: str) -> type[Pipeline]:
    """The class of a task. Raises RequestError where there is none of that name."""
    cls = TASKS.get(ALIASES.get(task, task))
    if cls is None:
        raise RequestError(f"task is {task!r}; legal are {', '.join((*TASKS, *ALIASES))}")
    return cls


def pipeline(
    task: str,
    model: str | Path | PreTrainedModel | None = None,
    *,
    tokenizer: str | Path | Tokenizer | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
    device_map: Any = None,
    model_kwargs: dict[str, Any] | None = None,
    batch_size: int = 1,
    **options: Any,
) -> Pipeline:
    """Something to call with texts.

    Args:
        task: a name of `TASKS`, or one of transformers' other names for them.
        model: a folder, a hub id, a model, or None for the bundled one.
        tokenizer: a folder, a hub id or a tokenizer; None is the model's own.
        revision: branch, tag or commit on the hub.
        dtype: what is computed in; None is float32 on a CPU, bfloat16 on a GPU.
        device: 0, "cuda:1", "cpu", -1 (the CPU); None is a GPU if there is one.
        device_map: instead of `device`, as for `from_pretrained`.
        model_kwargs: further arguments of `from_pretrained`.
        batch_size: texts that go through the model together.
        options: the task's own, for every call.

    Raises:
        RequestError: no such task, or options that contradict each other.
        CheckpointError, HubError: the model cannot be read.
    """
    cls = require_task(task)
    if device is not None and device_map is not None:
        raise RequestError("device and device_map both say where the model goes: give one of them")
    loaded = isinstance(model, PreTrainedModel)
    if tokenizer is None and loaded:
        raise RequestError("a model that is loaded already does not say what its tokenizer is: pass tokenizer=...")
    source: Any = model
    if not loaded:
        where = "cpu" if device == -1 else device_map if device is None else device
        source = cls.model_class.from_pretrained(
            source, revision=revision, dtype=dtype, device_map=where, **(model_kwargs or {})
        )
    elif device is not None or dtype is not None:
        source = source.to(device="cpu" if device == -1 else device, dtype=dtype)
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.from_pretrained(model if tokenizer is None else tokenizer, revision=revision)  # type: ignore[arg-type]
    return cls(source, tokenizer, batch_size=batch_size, **options)
