"""Answers found in texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from neoquant.errors import RequestError
from neoquant.hf.pipelines.base import Pipeline, require_known
from neoquant.loading.pretrained import GPTNeoForQuestionAnswering, PreTrainedModel

if TYPE_CHECKING:
    import tokenizers

_DEFAULTS = {
    "top_k": 1,
    "doc_stride": 128,
    "max_answer_len": 15,
    "max_seq_len": 384,
    "max_question_len": 64,
    "handle_impossible_answer": False,
    "align_to_words": True,
}


@dataclass(frozen=True)
class _Chunk:
    """A question and a stretch of its context: ids, and where its tokens, or their words, stand in the context."""

    ids: list[int]
    question: int  # tokens of the question, in front
    places: list[tuple[int, int]]


class QuestionAnsweringPipeline(Pipeline):
    """For each `{"question": ..., "context": ...}` the likeliest stretch of the context: `{"score", "start", "end",
    "answer"}`, with `start` and `end` counting characters.

    The score is the probability of its first token times that of its last, each among the tokens of the context; what
    candidates of one text (but for capitals) have is added up, as transformers 4.57 does.
    Options: `top_k` (above 1 a list, the likeliest first), `max_answer_len` tokens, `align_to_words` (True: answers are
    whole words), `handle_impossible_answer` (True: the empty answer competes, by the probability of the very first
    token), and for long texts `max_seq_len` tokens a chunk, question included, of which `doc_stride` are the former
    chunk's; `max_question_len` cuts questions. `question` may be a list, with one `context` or as many.
    """

    model_class: ClassVar[type[PreTrainedModel]] = GPTNeoForQuestionAnswering

    def __call__(
        self,
        inputs: Any = None,
        *,
        question: str | Sequence[str] | None = None,
        context: str | Sequence[str] | None = None,
        **options: Any,
    ) -> Any:
        if inputs is None:
            if question is None or context is None:
                raise RequestError("question-answering needs a question and a context")
            inputs = _together(question, context)
        return super().__call__(inputs, **options)

    def _check(self, options: Mapping[str, Any]) -> None:
        require_known(options, tuple(_DEFAULTS))
        for name in ("top_k", "max_answer_len", "max_seq_len", "max_question_len"):
            if options.get(name, 1) < 1:
                raise RequestError(f"{name} is {options[name]}; legal is at least 1")
        limit = self.model.config.max_position_embeddings
        asked = {**_DEFAULTS, **options}
        room = min(asked["max_seq_len"], limit) - asked["max_question_len"]
        stated = [name for name in ("doc_stride", "max_seq_len", "max_question_len") if name in options]
        if stated and not 0 <= asked["doc_stride"] < room:
            raise RequestError(
                f"doc_stride is {asked['doc_stride']}; legal is less than the {room} tokens that a chunk has beside "
                f"{asked['max_question_len']} of question"
            )

    def _run(self, inputs: list[Any], options: dict[str, Any]) -> list[Any]:
        asked = {**_DEFAULTS, **options}
        chunks = [list(self._chunks(given, asked)) for given in inputs]
        with torch.inference_mode():
            out = self.model(*self._collate([chunk.ids for of_input in chunks for chunk in of_input]), return_dict=True)
            logits = iter(torch.stack([out.start_logits, out.end_logits], dim=1).float().cpu())
        return [
            self._answers(given["context"], [(chunk, next(logits)) for chunk in of_input], asked)
            for given, of_input in zip(inputs, chunks, strict=True)
        ]

    def _chunks(self, given: Any, asked: dict[str, Any]) -> Iterator[_Chunk]:
        if not isinstance(given, Mapping) or not {"question", "context"} <= given.keys():
            raise RequestError(f'a question comes as {{"question": ..., "context": ...}}, got {given!r}')
        self._require_bare_texts()
        question = self.tokenizer.encode(given["question"])[: asked["max_question_len"]]
        encoded = self.tokenizer(given["context"], return_offsets_mapping=True)
        context, places = encoded.input_ids, encoded.offset_mapping
        if asked["align_to_words"]:
            places = _words(encoded.encoding())
        if not context:
            raise RequestError("the context is empty, so that nothing can be found in it")
        room = min(asked["max_seq_len"], self.model.config.max_position_embeddings) - len(question)
        # The defaults are for long contexts: a small model's chunks overlap by half at most.
        overlap = min(asked["doc_stride"], room // 2)
        for first in range(0, len(context), room - overlap):
            part = slice(first, first + room)
            yield _Chunk(question + context[part], len(question), places[part])
            if first + room >= len(context):
                return

    def _answers(self, context: str, chunks: list[tuple[_Chunk, Tensor]], asked: dict[str, Any]) -> Any:
        candidates = 2 * asked["top_k"] + 10 if asked["align_to_words"] else asked["top_k"]  # several may be one answer
        found: dict[str, dict[str, Any]] = {}
        nothing = 1.0
        for chunk, logits in chunks:
            spans, empty = _spans(chunk, logits, {**asked, "top_k": candidates})
            nothing = min(nothing, empty)
            for first, last, score in spans:
                start, end = chunk.places[first][0], chunk.places[last][1]
                answer = {"score": 0.0, "start": start, "end": end, "answer": context[start:end]}
                found.setdefault(context[start:end].lower(), answer)["score"] += score
        answers = list(found.values())
        if asked["handle_impossible_answer"]:
            answers.append({"score": nothing, "start": 0, "end": 0, "answer": ""})
        answers = sorted(answers, key=lambda answer: -answer["score"])[: asked["top_k"]]
        return answers[0] if asked["top_k"] == 1 else answers


def _together(question: str | Sequence[str], context: str | Sequence[str]) -> Any:
    """A question and a context, or a list of them. Raises RequestError for lists of two lengths."""
    if isinstance(question, str):
        return {"question": question, "context": context}
    contexts = [context] * len(question) if isinstance(context, str) else list(context)
    if len(contexts) != len(question):
        raise RequestError(f"{len(question)} questions and {len(contexts)} contexts are given: as many, or one context")
    return [{"question": each, "context": text} for each, text in zip(question, contexts, strict=True)]


def _words(encoding: tokenizers.Encoding) -> list[tuple[int, int]]:
    """Where the word of each token begins and ends in the text; of a token without a word, the token itself."""
    spans: list[tuple[int, int] | None] = [
        None if word is None else encoding.word_to_chars(word) for word in encoding.word_ids
    ]
    return [offset if span is None else span for span, offset in zip(spans, encoding.offsets, strict=True)]


def _spans(chunk: _Chunk, logits: Tensor, asked: dict[str, Any]) -> tuple[list[tuple[int, int, float]], float]:
    """The `top_k` likeliest stretches, by the context's tokens, and how likely it is that there is none."""
    length = len(chunk.ids)
    visible = torch.zeros(length, dtype=torch.bool)
    visible[chunk.question :] = True
    if asked["handle_impossible_answer"]:
        visible[0] = True
    start, end = logits[:, :length].masked_fill(~visible, -torch.inf).softmax(-1)
    empty = float(start[0] * end[0])
    start, end = start[chunk.question :], end[chunk.question :]
    scores = torch.outer(start, end).triu().tril(asked["max_answer_len"] - 1)
    best = scores.flatten().topk(min(asked["top_k"], scores.numel()))
    places = [divmod(place, len(end)) for place in best.indices.tolist()]
    return [(*place, score) for place, score in zip(places, best.values.tolist(), strict=True)], empty
