"""The documents and tokens on which a model differs from the reference the most, with the text around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from neoquant.evaluation.accumulator import AFTER, BEFORE, Peak
from neoquant.evaluation.corpus import Corpus, Tokenizer
from neoquant.evaluation.result import Choice, TokenChange, WorstDocument, WorstToken

DOCUMENTS = 10
"""Documents shown."""

LEAST_TOKENS = 32
"""Shorter documents are not ranked: one odd token would put them on top."""

BEGINNING = 64  # tokens shown of a document


def worst_tokens(corpus: Corpus, tokenizer: Tokenizer, peaks: Sequence[Peak]) -> tuple[WorstToken, ...]:
    """Peaks in words."""
    return tuple(_worst_token(corpus, tokenizer, peak) for peak in peaks)


def _worst_token(corpus: Corpus, tokenizer: Tokenizer, peak: Peak) -> WorstToken:
    unit, ids = corpus.units[peak.unit], corpus.windows[peak.window].ids.tolist()
    start, end = max(0, peak.index - BEFORE), min(len(ids), peak.index + AFTER + 1)
    start += ids[start] == tokenizer.eos_token_id and start < peak.index  # what stands before a document
    passage = []
    for number, text in enumerate(pieces(ids[start:end], tokenizer.decode), start - peak.start):
        known = 0 <= number < len(peak.changes)
        change = peak.changes[number] if known else None
        passage.append(TokenChange(text=text, loss_change=change, kl=peak.divergences[number] if known else None))
    tops = [
        Choice(text=tokenizer.decode([token]), probability=probability)
        for token, probability in zip(peak.top, peak.top_probability, strict=True)
    ]
    p_reference, p = torch.tensor(peak.nats, dtype=torch.float64).neg().exp().tolist()
    return WorstToken(
        unit=unit.id,
        subset=unit.subset,
        position=peak.position,
        token=tokenizer.decode([ids[peak.index]]),
        kl=peak.kl,
        probability_reference=p_reference,
        probability=p,
        top_reference=tops[0],
        top=tops[1],
        passage=tuple(passage),
        index=peak.index - start,
    )


def pieces(ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """The text of each token; of tokens that share a character, the last one has it."""
    texts = []
    start = 0
    for end in range(1, len(ids) + 1):
        text = decode(list(ids[start:end]))
        if text.endswith("\ufffd") and end - start < 4 and end < len(ids):  # UTF-8 takes four bytes at most
            texts.append("")
        else:
            texts.append(text)
            start = end
    return texts


def worst_documents(
    corpus: Corpus, tokenizer: Tokenizer, loss: torch.Tensor, kl: torch.Tensor
) -> tuple[WorstDocument, ...]:
    """The units with the largest mean KL a token; loss, kl: float64[units], changes summed."""
    ranked = sorted(
        (unit for unit in range(len(corpus.units)) if corpus.units[unit].tokens >= LEAST_TOKENS),
        key=lambda unit: (-float(kl[unit]) / corpus.units[unit].tokens, unit),
    )[:DOCUMENTS]
    beginnings = dict.fromkeys(ranked, "")
    for window in reversed(corpus.windows):
        if window.unit in beginnings:
            ids = window.ids[: BEGINNING + 1].tolist()
            skip = ids[0] == tokenizer.eos_token_id
            beginnings[window.unit] = tokenizer.decode(ids[skip : skip + BEGINNING])
    return tuple(
        WorstDocument(
            unit=corpus.units[unit].id,
            subset=corpus.units[unit].subset,
            tokens=corpus.units[unit].tokens,
            nats_per_token=float(loss[unit]) / corpus.units[unit].tokens,
            kl=float(kl[unit]) / corpus.units[unit].tokens,
            beginning=beginnings[unit],
        )
        for unit in ranked
    )
