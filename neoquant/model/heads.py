"""The three heads besides the language model's, with transformers' names, pooling and losses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neoquant.errors import RequestError
from neoquant.model.base import Network
from neoquant.model.config import GPTNeoConfig
from neoquant.model.gpt_neo import Decoder
from neoquant.model.outputs import QuestionAnsweringModelOutput, SequenceClassifierOutput, TokenClassifierOutput

_UNCACHED = {"use_cache": False}  # these outputs have no place for a cache

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


class SequenceClassifier(Network):
    """One label, or several, or a number, for a whole text: read off its last token."""

    def __init__(self, config: GPTNeoConfig, attn_implementation: str = "sdpa") -> None:
        super().__init__(config, attn_implementation)
        self.num_labels = config.num_labels
        self.transformer = Decoder(config, attn_implementation)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """`logits[B, labels]` of each row's last token that is not `pad_token_id`; `labels[B]` (or `[B, labels]`).

        Raises RequestError for several rows where the configuration has no `pad_token_id`: their last tokens cannot
        be told from padding.
        """
        base = self.transformer(input_ids, attention_mask, inputs_embeds=inputs_embeds, return_dict=True, **kwargs)
        scores = self.score(base.last_hidden_state.to(self.score.weight.device))  # [B, T, labels]
        rows = torch.arange(scores.shape[0], device=scores.device)
        logits = scores[rows, self._last(input_ids, scores)]
        loss = self._loss(logits, labels) if labels is not None else None
        return self.output(
            SequenceClassifierOutput(loss, logits, base.past_key_values, base.hidden_states, base.attentions),
            return_dict,
        )

    def _last(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        """Each row's rightmost position that does not hold padding."""
        B, T = scores.shape[:2]
        pad = self.config.pad_token_id
        if pad is None and B > 1:
            raise RequestError(
                f"a batch of {B} needs pad_token_id in the configuration, which has none: set it, or give single rows"
            )
        if pad is None or input_ids is None:
            return torch.full((B,), T - 1, device=scores.device)
        positions = torch.arange(T, device=scores.device)
        return ((input_ids != pad).to(scores.device) * positions).argmax(-1)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        kind = self.config.problem_type or self._guess_problem_type(labels)
        if kind not in PROBLEM_TYPES:
            raise RequestError(f"problem_type is {kind!r}; legal are {', '.join(PROBLEM_TYPES)}")
        labels = labels.to(logits.device)
        if kind == "regression":
            return F.mse_loss(logits.view(labels.shape) if self.num_labels == 1 else logits, labels.to(logits.dtype))
        if kind == "single_label_classification":
            return F.cross_entropy(logits.view(-1, self.num_labels), labels.view(-1))
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))

    def _guess_problem_type(self, labels: Tensor) -> str:
        if self.num_labels == 1:
            return "regression"
        return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


class TokenClassifier(Network):
    """A label for each token."""

    def __init__(self, config: GPTNeoConfig, attn_implementation: str = "sdpa") -> None:
        super().__init__(config, attn_implementation)
        self.num_labels = config.num_labels
        self.transformer = Decoder(config, attn_implementation)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """`logits[B, T, labels]`; `labels[B, T]`, -100 where a position does not count."""
        base = self.transformer(
            input_ids, attention_mask, inputs_embeds=inputs_embeds, return_dict=True, **_UNCACHED | kwargs
        )
        logits = self.classifier(self.dropout(base.last_hidden_state.to(self.classifier.weight.device)))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.view(-1, self.num_labels), labels.to(logits.device).view(-1))
        return self.output(TokenClassifierOutput(loss, logits, base.hidden_states, base.attentions), return_dict)


class QuestionAnswerer(Network):
    """Where in a text an answer starts and ends."""

    def __init__(self, config: GPTNeoConfig, attn_implementation: str = "sdpa") -> None:
        super().__init__(config, attn_implementation)
        self.transformer = Decoder(config, attn_implementation)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """`start_logits[B, T]` and `end_logits[B, T]`; positions `[B]`, those outside the text do not count."""
        base = self.transformer(
            input_ids, attention_mask, inputs_embeds=inputs_embeds, return_dict=True, **_UNCACHED | kwargs
        )
        start, end = self.qa_outputs(base.last_hidden_state.to(self.qa_outputs.weight.device)).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (_span_loss(start, start_positions) + _span_loss(end, end_positions)) / 2
        return self.output(
            QuestionAnsweringModelOutput(
                loss, start.contiguous(), end.contiguous(), base.hidden_states, base.attentions
            ),
            return_dict,
        )


def _span_loss(logits: Tensor, positions: Tensor) -> Tensor:
    """Cross-entropy over the positions of a text; one past its end stands for all that lie outside."""
    T = logits.shape[1]
    return F.cross_entropy(logits, positions.view(-1).to(logits.device).clamp(0, T), ignore_index=T)
