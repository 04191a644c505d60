"""What all tasks share: one text or many, in batches, at once or as they come."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor

from neoquant.errors import RequestError
from neoquant.loading.pretrained import PreTrainedModel
from neoquant.tokenizer.encoding import pad
from neoquant.tokenizer.tokenizer import Tokenizer


class Pipeline(ABC):
    """A task's way from inputs to plain values. `options` hold for every call that does not say otherwise."""

    model_class: ClassVar[type[PreTrainedModel]]

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer, *, batch_size: int = 1, **options: Any) -> None:
        if not isinstance(model, self.model_class):
            raise RequestError(f"this task needs a {self.model_class.__name__}, not a {type(model).__name__}")
        self.model: Any = model.eval()
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.options = options
        self._check(options)

    def __call__(self, inputs: Any, *, batch_size: int | None = None, **options: Any) -> Any:
        """The result of one input; the list of a list's results; of a generator or data set, an iterator over them.

        Raises RequestError for an input or an option that the task does not know, ContextError for a text too long.
        """
        options = {**self.options, **options}
        self._check(options)
        size = self.batch_size if batch_size is None else batch_size
        if size < 1:
            raise RequestError(f"batch_size is {size}; legal is at least 1")
        if isinstance(inputs, str | Mapping):
            return self._run([inputs], options)[0]
        if not isinstance(inputs, Iterable):
            raise RequestError(f"inputs are texts, one or several, not of type {type(inputs).__name__}")
        results = self._batches(inputs, size, options)
        return list(results) if isinstance(inputs, list | tuple) else results

    def _batches(self, inputs: Iterable[Any], size: int, options: dict[str, Any]) -> Iterator[Any]:
        torch.empty((), dtype=torch.int64).random_()  # as the DataLoader does that transformers has
        remaining = iter(inputs)
        while batch := list(islice(remaining, size)):
            yield from self._run(batch, options)

    @abstractmethod
    def _check(self, options: Mapping[str, Any]) -> None:
        """Refuse options that the task does not know, or illegal values of them."""

    @abstractmethod
    def _run(self, inputs: list[Any], options: dict[str, Any]) -> list[Any]:
        """The result of each input, which all go through the model together."""

    def _collate(self, rows: Sequence[Sequence[int]], side: str = "right") -> tuple[Tensor, Tensor]:
        """Ids and mask `[B, T]` on the model's device, padded on one side."""
        fillers = (self.tokenizer.pad_token_id, self.model.config.pad_token_id, self.tokenizer.eos_token_id)
        filler = next((filler for filler in fillers if filler is not None), 0)
        width = max(map(len, rows))
        ids, mask = pad(rows, width, filler, side), pad([[1] * len(row) for row in rows], width, 0, side)
        return torch.tensor(ids, device=self.model.device), torch.tensor(mask, device=self.model.device)

    def _require_bare_texts(self) -> None:
        """Raise RequestError for a tokenizer that adds special tokens to texts: this task cuts texts into chunks."""
        if added := self.tokenizer.num_special_tokens_to_add():
            raise RequestError(
                f"the tokenizer adds {added} special token(s) to each text, which this task cannot cut into chunks"
            )

    @property
    def _labels(self) -> list[str]:
        """What the model's outputs are called."""
        return list(self.model.config.id2label.values())


def require_known(options: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise RequestError for an option that is not among those known."""
    for name in options:
        if name not in known:
            raise RequestError(f"this task has no option {name!r}; it has {', '.join(known)}")


def require_legal(options: Mapping[str, Any], name: str, legal: Sequence[Any]) -> None:
    """Raise RequestError for a value that is not among those legal."""
    if name in options and options[name] not in legal:
        raise RequestError(f"{name} is {options[name]!r}; legal are {', '.join(map(repr, legal))}")
