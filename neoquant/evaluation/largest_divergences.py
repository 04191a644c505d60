"""The documents and tokens on which a model differs from the reference the most, with the text around them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from neoquant.evaluation.accumulator import AFTER, BEFORE, Peak
from neoquant.evaluation.corpus import Corpus, Tokenizer
from neoquant.evaluation.result import Choice, TokenChange, WorstDocument, WorstToken
from neoquant.evaluation.token_text import REPLACEMENT, decode_escaped, token_texts

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
    for number, text in enumerate(token_texts(ids[start:end], tokenizer), start - peak.start):
        known = 0 <= number < len(peak.changes)
        change = peak.changes[number] if known else None
        passage.append(TokenChange(text=text, loss_change=change, kl=peak.divergences[number] if known else None))
    likeliest = [
        tuple(Choice(text=decode_escaped([token], tokenizer), probability=p) for token, p in zip(*model, strict=True))
        for model in zip(peak.top, peak.top_probability, strict=True)
    ]
    p_reference, p = torch.tensor(peak.nats, dtype=torch.float64).neg().exp().tolist()
    return WorstToken(
        unit=unit.id,
        subset=unit.subset,
        position=peak.position,
        token=decode_escaped([ids[peak.index]], tokenizer),
        kl=peak.kl,
        probability_reference=p_reference,
        probability=p,
        top_reference=likeliest[0][0],
        top=likeliest[1][0],
        top_tokens_reference=likeliest[0],
        top_tokens=likeliest[1],
        passage=tuple(passage),
        index=peak.index - start,
    )


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
            beginnings[window.unit] = tokenizer.decode(ids[skip : skip + BEGINNING]).rstrip(REPLACEMENT)
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
