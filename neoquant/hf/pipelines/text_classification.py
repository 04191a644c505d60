"""Labels for whole texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from neoquant.errors import RequestError
from neoquant.hf.pipelines.base import Pipeline, require_known, require_legal
from neoquant.loading.pretrained import GPTNeoForSequenceClassification, PreTrainedModel

_FUNCTIONS = ("sigmoid", "softmax", "none", None)


class TextClassificationPipeline(Pipeline):
    """For each text its likeliest label, `{"label": ..., "score": ...}`; for a single one a list of it.

    A text is a string, or `{"text": ..., "text_pair": ...}`. Options: `top_k` labels (None: all) as a list, the
    likeliest first; `function_to_apply`, "softmax", "sigmoid" or "none" (what the model's problem type calls for);
    `truncation` and `max_length`, the tokenizer's.
    """

    model_class: ClassVar[type[PreTrainedModel]] = GPTNeoForSequenceClassification

    def __call__(self, inputs: Any, **options: Any) -> Any:
        result = super().__call__(inputs, **options)
        return [result] if isinstance(inputs, str) and "top_k" not in {**self.options, **options} else result

    def _check(self, options: Mapping[str, Any]) -> None:
        require_known(options, ("top_k", "function_to_apply", "truncation", "max_length"))
        require_legal(options, "function_to_apply", _FUNCTIONS)

    def _run(self, inputs: list[Any], options: dict[str, Any]) -> list[Any]:
        cut: dict[str, Any] = {name: options[name] for name in ("truncation", "max_length") if name in options}
        ids, mask = self._collate([self._encode(text, cut) for text in inputs])
        with torch.inference_mode():
            logits = self.model(ids, mask, use_cache=False, return_dict=True).logits.float().cpu()
        return [self._result(row, options) for row in logits]

    def _encode(self, text: Any, cut: dict[str, Any]) -> list[int]:
        if isinstance(text, Mapping):
            first, pair = text["text"], text.get("text_pair")
        elif isinstance(text, str):
            first, pair = text, None
        else:
            raise RequestError(f'a text to classify is a string or {{"text": ..., "text_pair": ...}}, got {text!r}')
        ids: list[int] = self.tokenizer(first, pair, **cut).input_ids
        if not ids:
            raise RequestError("an empty text has no token to be classified by")
        return ids

    def _result(self, logits: Tensor, options: dict[str, Any]) -> Any:
        scores = self._scores(logits, options.get("function_to_apply"))
        labelled = [{"label": name, "score": score} for name, score in zip(self._labels, scores.tolist(), strict=True)]
        labelled.sort(key=lambda found: -found["score"])
        return labelled[: options["top_k"]] if "top_k" in options else labelled[0]

    def _scores(self, logits: Tensor, function: str | None) -> Tensor:
        config = self.model.config
        if function is None:
            several = config.problem_type == "multi_label_classification" or config.num_labels == 1
            function = "none" if config.problem_type == "regression" else "sigmoid" if several else "softmax"
        if function == "none":
            return logits
        return logits.sigmoid() if function == "sigmoid" else logits.softmax(-1)
