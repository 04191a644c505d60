"""What `generate` returns beside the ids where that is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from neoquant.model.cache import KVCache
from neoquant.model.outputs import ModelOutput


@dataclass
class GenerateDecoderOnlyOutput(ModelOutput):
    """`sequences[B, T + new]`, and for each new token, where they are asked for, `scores[B, V]`, by which it was chosen
    (-inf on what could not be), and `logits[B, V]`, as the model gave them; 0 in rows that had ended.
    `past_key_values` holds all positions but the last: with it, `generate` goes on from `sequences` and what follows
    them. Of several rows that may end apart, only where it was given: rows that had ended are then computed as well.
    There is none of rows with padding behind their tokens."""

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    past_key_values: KVCache | None = None


class KeptScores:
    """Keeps what `generate_as` is to return beside the ids."""

    def __init__(self, scores: bool, logits: bool) -> None:
        self._scores: list[Tensor] | None = [] if scores else None
        self._logits: list[Tensor] | None = [] if logits else None

    def __call__(self, logits: Tensor, scores: Tensor) -> None:
        """Take one position's, `[B, V]` each."""
        if self._scores is not None:
            self._scores.append(scores)
        if self._logits is not None:
            self._logits.append(logits.float())

    def beside(self, sequences: Tensor, new: int, cache: KVCache | None) -> GenerateDecoderOnlyOutput:
        """All of it; a GPU may have gone on behind the last of `new` tokens."""
        scores, logits = (None if kept is None else tuple(kept[:new]) for kept in (self._scores, self._logits))
        return GenerateDecoderOnlyOutput(sequences, scores, logits, cache)
