"""A vocabulary of one's own texts for a pipeline that stays as it is, by the library's trainers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from neoquant.errors import RequestError
from neoquant.sizes import plural
from neoquant.tokenizer.words import refuse_options

if TYPE_CHECKING:
    import tokenizers


def trained_backend(
    backend: tokenizers.Tokenizer,
    texts: Iterable[Any],
    size: int,
    *,
    special: Mapping[str, str],
    added: Sequence[Any] = (),
    length: int | None = None,
    options: Mapping[str, Any],
) -> tokenizers.Tokenizer:
    """A pipeline like `backend` whose BPE has learned `size` tokens from `texts`, special tokens among them.

    Args:
        texts: texts, or lists of them.
        special: former special token -> what it is called now, for those that change.
        added: further special tokens.
        length: how many texts there are, for the library's progress bar.
        options: of the library's trainer, `min_frequency` for one.

    Raises RequestError for a model that is no BPE, or what the library refuses.
    """
    import tokenizers
    from tokenizers.trainers import BpeTrainer

    refuse_options("training", options, (name for name in dir(BpeTrainer) if not name.startswith("_")))
    state = json.loads(backend.to_str())
    if state["model"].get("type") != "BPE":
        raise RequestError(f"the tokenizer's model is {state['model'].get('type')}; only BPE is trained here")
    former = sorted(backend.get_added_tokens_decoder().items())
    tokens = [_renamed(token, special) for _, token in former]
    names = {token.content for token in tokens}
    tokens += [token for token in added if getattr(token, "content", token) not in names]
    post, state["post_processor"], state["added_tokens"] = state["post_processor"], None, []
    state["model"] |= {"vocab": {}, "merges": []}
    if state["model"].get("unk_token") is not None:
        state["model"]["unk_token"] = special.get(state["model"]["unk_token"], state["model"]["unk_token"])
    made: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
    try:
        stated: dict[str, Any] = {"vocab_size": size, "special_tokens": tokens, "show_progress": False}
        stated |= {"initial_alphabet": _alphabet(state)} | dict(options)
        made.train_from_iterator(texts, BpeTrainer(**stated), length=length)
    except Exception as error:  # the library raises nothing more precise
        raise RequestError(f"no vocabulary of {plural(size, 'token')} can be trained: {error}") from None
    whole = json.loads(made.to_str())
    whole["post_processor"] = _renumbered(post, made, special)
    return tokenizers.Tokenizer.from_str(json.dumps(whole))


def _renumbered(part: Any, made: tokenizers.Tokenizer, special: Mapping[str, str]) -> Any:
    """A part of a post-processor, whose tokens have their new texts and ids."""
    if isinstance(part, list):
        return [_renumbered(each, made, special) for each in part]
    if not isinstance(part, dict):
        return part
    if "ids" in part and "tokens" in part:
        tokens = [special.get(token, token) for token in part["tokens"]]
        return part | {"tokens": tokens, "ids": [made.token_to_id(token) for token in tokens]}
    return {name: _renumbered(each, made, special) for name, each in part.items()}


def _alphabet(state: Mapping[str, Any]) -> list[str]:
    """Every byte, as letters, where the pipeline spells texts in bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    return list(ByteLevel.alphabet()) if '"ByteLevel"' in json.dumps(state.get("pre_tokenizer")) else []


def _renamed(token: Any, special: Mapping[str, str]) -> Any:
    from tokenizers import AddedToken

    if token.content not in special:
        return token
    flags = {flag: getattr(token, flag) for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    return AddedToken(special[token.content], **flags)
