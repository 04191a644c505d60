"""The documents and tokens on which a model differs from the reference the most, with the text around them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from neoquant.evaluation.accumulator import CONTEXT_AFTER, CONTEXT_BEFORE, DivergentToken
from neoquant.evaluation.corpus import Corpus, TokenizerLike
from neoquant.evaluation.result import Choice, TokenChange, WorstDocument, WorstToken
from neoquant.evaluation.token_text import REPLACEMENT, decode_escaped, token_texts

DOCUMENTS = 10
"""Documents listed."""

MINIMUM_TOKENS = 32
"""Shorter documents are not ranked: a single token would dominate their mean."""

BEGINNING = 64  # tokens of a document that are shown


def worst_tokens(
    corpus: Corpus, tokenizer: TokenizerLike, divergent: Sequence[DivergentToken]
) -> tuple[WorstToken, ...]:
    """The tokens with the text around them."""
    return tuple(_worst_token(corpus, tokenizer, token) for token in divergent)


def _worst_token(corpus: Corpus, tokenizer: TokenizerLike, token: DivergentToken) -> WorstToken:
    unit, ids = corpus.units[token.unit], corpus.windows[token.window].ids.tolist()
    start, end = max(0, token.index - CONTEXT_BEFORE), min(len(ids), token.index + CONTEXT_AFTER + 1)
    start += ids[start] == tokenizer.eos_token_id and start < token.index  # the end-of-text token before a document
    passage = []
    for number, text in enumerate(token_texts(ids[start:end], tokenizer), start - token.start):
        is_scored = 0 <= number < len(token.changes)
        change, kl = (token.changes[number], token.divergences[number]) if is_scored else (None, None)
        passage.append(TokenChange(text=text, loss_change=change, kl=kl))
    likeliest = [
        tuple(Choice(text=decode_escaped([id], tokenizer), probability=p) for id, p in zip(*model, strict=True))
        for model in zip(token.top, token.top_probability, strict=True)
    ]
    p_reference, p = torch.tensor(token.nats, dtype=torch.float64).neg().exp().tolist()
    return WorstToken(
        unit=unit.id,
        subset=unit.subset,
        position=token.position,
        token=decode_escaped([ids[token.index]], tokenizer),
        kl=token.kl,
        probability_reference=p_reference,
        probability=p,
        top_reference=likeliest[0][0],
        top=likeliest[1][0],
        top_tokens_reference=likeliest[0],
        top_tokens=likeliest[1],
        passage=tuple(passage),
        index=token.index - start,
    )


def worst_documents(
    corpus: Corpus, tokenizer: TokenizerLike, loss: torch.Tensor, kl: torch.Tensor
) -> tuple[WorstDocument, ...]:
    """The units with the largest mean KL a token; loss, kl: float64[units], changes summed."""
    ranked = sorted(
        (unit for unit in range(len(corpus.units)) if corpus.units[unit].tokens >= MINIMUM_TOKENS),
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
