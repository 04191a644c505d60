"""Labels for the tokens of texts, and for the stretches that they make up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor

from neoquant.errors import ContextError, RequestError
from neoquant.hf.pipelines.base import Pipeline, require_known, require_legal
from neoquant.loading.pretrained import GPTNeoForTokenClassification, PreTrainedModel

STRATEGIES = ("none", "simple", "first", "average", "max")


@dataclass(frozen=True)
class _Piece:
    """A token, or the tokens of a word: where it stands in its text, and how likely each label is."""

    ids: tuple[int, ...]
    index: int
    start: int
    end: int
    scores: Tensor  # [labels]
    begins_word: bool

    @property
    def label(self) -> int:
        return int(self.scores.argmax())


class TokenClassificationPipeline(Pipeline):
    """For each text the list of its labelled tokens, or of the stretches that go together.

    Options: `aggregation_strategy`: "none" labels each token, as `{"entity", "score", "index", "word", "start",
    "end"}`; "simple" joins neighbours of one label (`B-` begins another), as `{"entity_group", "score", "word",
    "start", "end"}`; "first", "average" and "max" do so after giving each word one label: its first token's, that of
    the mean, or of the most certain token. `ignore_labels` (["O"]) are left out. A text longer than the context is
    refused unless `stride` says by how many tokens its pieces overlap.
    """

    model_class: ClassVar[type[PreTrainedModel]] = GPTNeoForTokenClassification

    def _check(self, options: Mapping[str, Any]) -> None:
        require_known(options, ("aggregation_strategy", "ignore_labels", "stride"))
        require_legal(options, "aggregation_strategy", STRATEGIES)
        stride = options.get("stride")
        if stride is None:
            return
        if options.get("aggregation_strategy", "none") == "none":
            raise RequestError("stride needs an aggregation_strategy other than 'none': tokens are met more than once")
        if not 0 <= stride < self._limit:
            raise RequestError(f"stride is {stride}; legal is 0 to {self._limit - 1}")

    @property
    def _limit(self) -> int:
        return int(min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings))

    def _run(self, inputs: list[Any], options: dict[str, Any]) -> list[Any]:
        chunks = [list(self._chunks(text, options.get("stride"))) for text in inputs]
        rows = [ids for of_text in chunks for ids, _, _ in of_text]
        logits: Iterator[Tensor] = iter(())
        if rows:
            with torch.inference_mode():
                logits = iter(self.model(*self._collate(rows), return_dict=True).logits.float().softmax(-1).cpu())
        return [self._result(text, of_text, logits, options) for text, of_text in zip(inputs, chunks, strict=True)]

    def _chunks(self, text: Any, stride: int | None) -> Iterator[tuple[list[int], list[tuple[int, int]], int]]:
        """Ids and offsets of as much as fits into the context, and the number of the first token."""
        if not isinstance(text, str):
            raise RequestError(f"token-classification labels the tokens of strings, not of type {type(text).__name__}")
        self._require_bare_texts()
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        ids, offsets, limit = encoded.input_ids, encoded.offset_mapping, self._limit
        if len(ids) > limit and stride is None:
            raise ContextError(f"a text has {len(ids)} tokens, and the context {limit}: pass stride=... to go over it")
        for first in range(0, len(ids), limit - (stride or 0)):
            yield ids[first : first + limit], offsets[first : first + limit], first
            if first + limit >= len(ids):
                return

    def _result(self, text: str, chunks: list[Any], logits: Iterator[Tensor], options: dict[str, Any]) -> Any:
        strategy, ignored = options.get("aggregation_strategy", "none"), options.get("ignore_labels", ["O"])
        found: list[dict[str, Any]] = []
        for ids, offsets, _ in chunks:
            pieces = list(_pieces(text, ids, offsets, next(logits)))
            if strategy == "none":
                found += [self._token(piece) for piece in pieces]
            else:
                words = pieces if strategy == "simple" else [_word(tokens, strategy) for tokens in _by_word(pieces)]
                found += [self._stretch(together) for together in self._together(words)]
        found = [entity for entity in found if entity.get("entity", entity.get("entity_group")) not in ignored]
        return found if len(chunks) < 2 else _without_overlaps(found)

    def _token(self, piece: _Piece) -> dict[str, Any]:
        return {
            "entity": self._labels[piece.label],
            "score": float(piece.scores.max()),
            "index": piece.index,
            "word": self.tokenizer.convert_ids_to_tokens(piece.ids)[0],
            "start": piece.start,
            "end": piece.end,
        }

    def _together(self, pieces: list[_Piece]) -> list[list[_Piece]]:
        """Neighbours of one label, whatever stands before its hyphen; B- begins another stretch."""
        groups: list[list[_Piece]] = []
        for piece in pieces:
            begins, kind = self._kind(piece)
            if groups and not begins and kind == self._kind(groups[-1][-1])[1]:
                groups[-1].append(piece)
            else:
                groups.append([piece])
        return groups

    def _kind(self, piece: _Piece) -> tuple[bool, str]:
        label = self._labels[piece.label]
        return label.startswith("B-"), label[2:] if label[:2] in ("B-", "I-") else label

    def _stretch(self, pieces: list[_Piece]) -> dict[str, Any]:
        return {
            "entity_group": self._labels[pieces[0].label].split("-", 1)[-1],
            "score": float(torch.stack([piece.scores.max() for piece in pieces]).mean()),
            "word": self.tokenizer.decode([token for piece in pieces for token in piece.ids]),
            "start": pieces[0].start,
            "end": pieces[-1].end,
        }


def _pieces(text: str, ids: list[int], offsets: list[tuple[int, int]], scores: Tensor) -> Iterator[_Piece]:
    for index, (token, (start, end)) in enumerate(zip(ids, offsets, strict=True)):
        begins_word = start == 0 or " " in text[start - 1 : start + 1]
        yield _Piece((token,), index, start, end, scores[index], begins_word)


def _by_word(pieces: list[_Piece]) -> list[list[_Piece]]:
    number, numbered = 0, []
    for at, piece in enumerate(pieces):
        number += at > 0 and piece.begins_word
        numbered.append((number, piece))
    return [[piece for _, piece in group] for _, group in groupby(numbered, key=lambda pair: pair[0])]


def _word(tokens: list[_Piece], strategy: str) -> _Piece:
    """The tokens of a word as one piece."""
    scores = tokens[0].scores
    if strategy == "max":
        scores = max((token.scores for token in tokens), key=lambda scores: float(scores.max()))
    elif strategy == "average":
        scores = torch.stack([token.scores for token in tokens]).mean(0)
    ids = tuple(number for token in tokens for number in token.ids)
    return replace(tokens[0], ids=ids, end=tokens[-1].end, scores=scores)


def _without_overlaps(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of stretches that overlap, the longest, or the likeliest of equally long ones."""
    kept: list[dict[str, Any]] = []
    for entity in sorted(found, key=lambda entity: entity["start"]):
        if kept and kept[-1]["start"] <= entity["start"] < kept[-1]["end"]:
            kept[-1] = max(kept[-1], entity, key=lambda one: (one["end"] - one["start"], one["score"]))
        else:
            kept.append(entity)
    return kept
