"""How much a pipeline may make of a text, and how far its ids may reach: either would take all memory or time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from neoquant.errors import CheckpointError

MAX_GROWTH = 64
"""Times that a pipeline's replacements may make a text longer, all together."""

MAX_TOKEN = 2**24
"""The largest id of a token: the tokenizers library counts up to it whenever a vocabulary is written."""


def check_ids(model: Any, file: str) -> None:
    """Raise CheckpointError for an id in the vocabulary of a pipeline's `model` that is above `MAX_TOKEN`.

    Ids that are no numbers are left to the library, which refuses them.
    """
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    for token, number in vocab.items() if isinstance(vocab, Mapping) else ():
        if isinstance(number, int | float) and not 0 <= number <= MAX_TOKEN:
            raise CheckpointError(
                f"{file}: {token!r:.100} has the id {number}; legal is an integer of 0 to {MAX_TOKEN:,}"
            )


def check_growth(pipeline: Mapping[str, Any]) -> None:
    """Raise CheckpointError where the replacements of a `tokenizer.json` multiply text more than `MAX_GROWTH` times."""
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        growth = 1.0
        for step in _steps(pipeline.get(part)):
            growth *= _growth(step)
            if growth > MAX_GROWTH:
                raise CheckpointError(
                    f"its {part} may make a text {growth:,.0f} times longer; at most {MAX_GROWTH} times is legal"
                )


def _steps(part: Any) -> Iterator[Mapping[str, Any]]:
    """Every step of a part, those inside sequences in order."""
    waiting = [part]
    while waiting:
        step = waiting.pop(0)
        if isinstance(step, list):
            waiting = [*step, *waiting]
        elif isinstance(step, Mapping):
            yield step
            waiting = [*(step[key] for key in ("normalizers", "pretokenizers", "decoders") if key in step), *waiting]


def _growth(step: Mapping[str, Any]) -> float:
    """How much longer one step makes a text, at most. A pattern that is no plain string may match one character."""
    content, pattern = step.get("content"), step.get("pattern")
    if step.get("type") != "Replace" or not isinstance(content, str):
        return 1.0
    plain = pattern.get("String") if isinstance(pattern, Mapping) else None
    if not isinstance(plain, str):
        return max(1.0, len(content))
    return max(1.0, len(content) / len(plain)) if plain else 1.0 + len(content)
