"""What calibrated quantizers are shown: rows of text, run block after block through the model as it is quantized."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from neoquant.errors import RequestError
from neoquant.model.gpt_neo import AttentionMasks, Block
from neoquant.moments import output_moments
from neoquant.states import States

ROWS, LENGTH = 128, 2048  # of text, where nothing else is asked for; a row is never longer than the context

SHARING = (  # layers of a block that see the same inputs, in the order in which they are quantized
    ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
    ("attn.attention.out_proj",),
    ("mlp.c_fc",),
    ("mlp.c_proj",),
)

Observe = Callable[[tuple[str, ...], Callable[[], Iterator[Tensor]], int], Any]
Round = Callable[[str, Tensor, Any, Tensor | None], Tensor]


@dataclass(frozen=True)
class Calibration:
    """Rows of token ids, and where they come from.

    `ids` int64[rows, length]; `source` in words; `sha256` of the text they were drawn from; `seed` of the drawing;
    `documents` the fingerprints of those that some row holds a part of.
    """

    ids: Tensor = field(repr=False)
    source: str
    sha256: str
    seed: int
    documents: tuple[str, ...] = field(default=(), repr=False)

    def describe(self) -> dict[str, Any]:
        """For records: everything but the ids, which are counted, and the documents."""
        rows, length = self.ids.shape
        return {"source": self.source, "sha256": self.sha256, "rows": rows, "length": length, "seed": self.seed}


def draw(texts: Sequence[Sequence[int]], end: int, rows: int, length: int, seed: int) -> Tensor:
    """`rows` pieces of `length` ids, int64, from anywhere in the texts (as ids) joined by `end`.

    Raises RequestError if there is less text than one row.
    """
    if rows < 1 or length < 1:
        raise RequestError(f"{rows} rows of {length} tokens: at least one of each is needed")
    stream = torch.tensor([token for text in texts for token in (*text, end)], dtype=torch.int64)
    return torch.stack([stream[start : start + length] for start in _starts(len(stream), rows, length, seed)])


def drawn_from(texts: Sequence[Sequence[int]], rows: int, length: int, seed: int) -> list[int]:
    """Which of the texts the rows of `draw` hold a token of, in order."""
    ends = list(accumulate(len(text) + 1 for text in texts))
    starts = _starts(ends[-1] if ends else 0, rows, length, seed)
    touched = set()
    for start in starts:
        first, last = bisect_right(ends, start), bisect_right(ends, start + length - 1)
        # the last of a text's ids in the stream is the end that stands behind it
        touched |= {number for number in range(first, last + 1) if texts[number] and start < ends[number] - 1}
    return sorted(touched)


def _starts(total: int, rows: int, length: int, seed: int) -> list[int]:
    """Where in a stream of so many ids each row begins."""
    if total < length:
        raise RequestError(f"calibration needs {length} tokens for a row, the text has {total}")
    random = torch.Generator().manual_seed(seed)
    starts: list[int] = torch.randint(0, total - length + 1, (rows,), generator=random).tolist()
    return starts


def fingerprint(text: str) -> str:
    """By which a document is known again: 16 hex digits of the SHA-256 of its whole text, but for space around it."""
    return hashlib.sha256(text.strip().encode("utf-8", "surrogatepass")).hexdigest()[:16]


def hash_texts(texts: Sequence[str]) -> str:
    """SHA-256 of the texts in order, a zero byte after each."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


class Walk:
    """Hidden states [R, T, C] on their way through the model, one block at a time.

    The inputs of every layer are those that the layers quantized before it give; each is computed once, but for the
    inner activations of the MLP, which are four times as wide and so computed again if they are many.
    """

    def __init__(self, x: States, window: int, keep_inner: bool = False) -> None:
        """`x` the embedded rows, which are used up; `window` of local layers; whether inner activations are kept."""
        self.x, self.keep_inner = x, keep_inner
        self.masks = AttentionMasks(x.shape[1], x.shape[1], window, None, torch.device("cpu"))

    def through(self, block: Block, observe: Observe, rounded: Round, weigh: bool = False) -> None:
        """Quantize the layers of `block` on the way, and leave in `x` what the quantized block gives.

        Args:
            block: changed: each linear's weight becomes what `rounded` gives for it.
            observe: is given the layers that share them, an iterator of their inputs and its width, and makes what
                `rounded` is given.
            rounded: name in the block, weight[O, I], what was observed and, for q, k and v where `weigh` asks for it,
                the moments of their outputs -> the weight as it is after quantization.
            weigh: see `rounded` and `moments.output_moments`.
        """
        attention, mlp = block.attn.attention, block.mlp
        kept = self.x.twin()  # what out_proj sees
        outputs: dict[str, Tensor] = {}

        def settle(stage: int, inputs: Callable[[], Iterator[Tensor]]) -> None:
            linears = {name: block.get_submodule(name) for name in SHARING[stage]}
            first = next(iter(linears.values()))
            assert isinstance(first, nn.Linear)
            seen = observe(SHARING[stage], inputs, first.in_features)
            for name, linear in linears.items():
                assert isinstance(linear, nn.Linear)
                moments = outputs.get(name.rpartition(".")[2])
                linear.weight = nn.Parameter(rounded(name, linear.weight.detach(), seen, moments), requires_grad=False)

        def inner() -> Iterator[Tensor]:
            return (mlp.act(mlp.c_fc(block.ln_2(x))) for x in self.x.pieces())

        if weigh:
            outputs |= output_moments(attention, (block.ln_1(x) for x in self.x.pieces()), len(self.x))
        settle(0, lambda: (block.ln_1(x) for x in self.x.pieces()))
        kept.replace(attention.context(block.ln_1(x), self.masks, None) for x in self.x.pieces())
        settle(1, kept.pieces)
        self.x.replace(x.add_(attention.out_proj(y)) for x, y in zip(self.x.pieces(), kept.pieces(), strict=True))
        kept.close()
        settle(2, lambda: (block.ln_2(x) for x in self.x.pieces()))
        activations = list(inner()) if self.keep_inner else None
        shown = inner if activations is None else activations.__iter__
        settle(3, shown)
        self.x.replace(x.add_(mlp.c_proj(y)) for x, y in zip(self.x.pieces(), shown(), strict=True))
