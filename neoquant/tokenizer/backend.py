"""A folder's vocabulary as a pipeline of the tokenizers library, the same that transformers 5 builds."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neoquant.errors import CheckpointError, RequestError
from neoquant.tokenizer.bounds import check_growth, check_ids
from neoquant.tokenizer.settings import FAST, SLOW_MERGES, SLOW_VOCAB, TokenizerSettings, added_in_file, read_object

if TYPE_CHECKING:
    import tokenizers

# What GPT2Tokenizer sets whatever the file says: https://huggingface.co/docs/tokenizers/api/models#tokenizers.models.BPE
_GPT2_MODEL = {
    "dropout": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
    "continuing_subword_prefix": "",
    "end_of_word_suffix": "",
}


def build_backend(folder: Path, fast: dict[str, Any] | None, settings: TokenizerSettings) -> tokenizers.Tokenizer:
    """The pipeline of `tokenizer.json`, or of `vocab.json` and `merges.txt`, with every added token.

    Args:
        folder: where the files are.
        fast: the content of tokenizer.json; None where there is none.
        settings: what the other files say.

    Raises CheckpointError for files that cannot be read, or added tokens whose ids are not those that they would get.
    """
    import tokenizers

    if fast is None and not settings.gpt2:
        raise CheckpointError(
            f"no {FAST} here, and the tokenizer's class reads nothing else: {SLOW_VOCAB} and {SLOW_MERGES} need "
            "tokenizer_class GPT2Tokenizer"
        )
    if fast is not None:
        check_growth(fast)
        check_ids(fast.get("model"), FAST)
    else:
        check_ids({"vocab": read_object(folder / SLOW_VOCAB)}, SLOW_VOCAB)
    name = FAST if fast is not None else f"{SLOW_VOCAB} or {SLOW_MERGES}"
    try:
        if fast is None:
            read = tokenizers.models.BPE.read_file(str(folder / SLOW_VOCAB), str(folder / SLOW_MERGES))
            whole = tokenizers.ByteLevelBPETokenizer(*read, add_prefix_space=settings.add_prefix_space)
            backend: tokenizers.Tokenizer = whole._tokenizer
        else:
            backend = tokenizers.Tokenizer.from_str(json.dumps(_pipeline(fast, settings)))
    except CheckpointError:
        raise
    except Exception as error:  # the library raises bare Exception for a damaged file
        raise CheckpointError(f"{name} cannot be read as a tokenizer: {error}") from None
    _add_tokens(backend, settings)
    _check_ids(backend, fast, settings)
    backend.encode_special_tokens = settings.split_special_tokens
    if settings.add_bos_token is not None or settings.add_eos_token is not None:
        bos = settings.special.get("bos_token") if settings.add_bos_token else None
        eos = settings.special.get("eos_token") if settings.add_eos_token else None
        set_template(backend, bos, eos)
    return backend


def write_vocabulary(folder: Path, vocab: Any, merges: Any) -> None:
    """`vocab.json` and `merges.txt` of what was given as contents or as files of theirs.

    Raises RequestError for what is neither.
    """
    if isinstance(vocab, str | Path):
        vocab = read_object(_existing(vocab, "vocab"))
    if isinstance(merges, str | Path):
        merges = _existing(merges, "merges").read_text("utf-8").splitlines()
    if not isinstance(vocab, Mapping) or not isinstance(merges, list | tuple):
        raise RequestError(
            "a tokenizer is made of a folder (from_pretrained), of a pipeline of the tokenizers library, or of vocab, "
            f"token -> id, and merges, a list of pairs; vocab is {vocab!r:.60} and merges are {merges!r:.60}"
        )
    lines = [pair if isinstance(pair, str) else " ".join(map(str, pair)) for pair in merges]
    (folder / SLOW_VOCAB).write_text(json.dumps(dict(vocab)), "utf-8")
    (folder / SLOW_MERGES).write_text("".join(f"{line}\n" for line in lines), "utf-8")


def _existing(path: str | Path, what: str) -> Path:
    """The file of that path. Raises RequestError where there is none."""
    if not Path(path).is_file():
        raise RequestError(f"{what} is {str(path)!r}, and there is no such file")
    return Path(path)


def set_template(backend: tokenizers.Tokenizer, first: str | None, last: str | None) -> None:
    """Let `first` begin and `last` end each text of an input, where they are not None.

    Raises RequestError for one that is no token.
    """
    from tokenizers.processors import TemplateProcessing

    def part(letter: str, kind: int) -> list[str]:
        pieces = (named(first), f"${letter}", named(last))
        return [f"{piece}:{kind}" for piece in pieces if piece is not None]

    def named(token: str | None) -> str | None:
        """What it is called in the template, where a token that begins with a dollar would be read as a text."""
        return token if token is None or not token.startswith("$") else f"token {token}"

    ids = {token: backend.token_to_id(token) for token in (first, last) if token is not None}
    for token, number in ids.items():
        if number is None:
            raise RequestError(f"{token!r} is no token of this tokenizer, so it cannot begin or end a text")
    single, second = part("A", 0), part("B", 1)
    special = [{"id": named(token), "ids": [number], "tokens": [token]} for token, number in ids.items()]
    backend.post_processor = TemplateProcessing(single=single, pair=[*single, *second], special_tokens=special)


def _check_ids(backend: tokenizers.Tokenizer, fast: dict[str, Any] | None, settings: TokenizerSettings) -> None:
    """Raise CheckpointError where an added token's id is not the stated one: text would become ids of other tokens."""
    stated = {token.content: number for number, token in settings.added.items()}
    in_file = {token["content"]: token["id"] for token in added_in_file(fast)}
    if settings.gpt2 and (dropped := [content for content in in_file if backend.token_to_id(content) is None]):
        _warn(
            f"{FAST} adds {', '.join(map(repr, dropped))}, which added_tokens_decoder does not name: GPT2Tokenizer "
            "drops what it does not name, as in transformers 5; tokenizer_class PreTrainedTokenizerFast keeps it"
        )
    for content, number in (stated if settings.gpt2 else {**in_file, **stated}).items():
        found = backend.token_to_id(content)
        if found != number:
            raise CheckpointError(
                f"the added token {content!r} has the id {number} by the folder's files, but gets {found}: "
                "added tokens are numbered from the vocabulary's end on, without gaps"
            )


def _pipeline(fast: dict[str, Any], settings: TokenizerSettings) -> dict[str, Any]:
    """tokenizer.json as it is to be built: without what a training run left, and GPT-2's where the class says so."""
    state = {**fast, "truncation": None, "padding": None}
    pre = fast.get("pre_tokenizer")
    if not settings.gpt2:
        if settings.add_prefix_space and not (isinstance(pre, dict) and pre.get("add_prefix_space")):
            _warn("add_prefix_space is not applied: tokenizer.json says otherwise, and its class takes it as it stands")
        return state
    model = fast.get("model")
    # Old files do not say which model they hold; only BPE has merges.
    if not isinstance(model, dict) or model.get("type", "BPE" if "merges" in model else None) != "BPE":
        kind = model.get("type") if isinstance(model, dict) else model
        raise CheckpointError(f"{FAST} holds a {kind} model, and GPT2Tokenizer is BPE: see tokenizer_class")
    byte_level = {"type": "ByteLevel", "add_prefix_space": settings.add_prefix_space, "trim_offsets": True}
    own = isinstance(pre, dict) and pre.get("type") == "ByteLevel" and pre.get("use_regex", True)
    if not own or pre["add_prefix_space"] != settings.add_prefix_space:  # type: ignore[index]
        state["pre_tokenizer"] = {**byte_level, "use_regex": True}
    decoder = fast.get("decoder")
    kept = isinstance(decoder, dict) and decoder.get("type") == "ByteLevel"
    state["decoder"] = decoder if kept else {**byte_level, "use_regex": True}
    replaced = [("normalizer", fast.get("normalizer") is None), ("pre_tokenizer", own), ("decoder", kept)]
    if names := [name for name, fits in replaced if not fits]:
        _warn(
            f"{FAST}: its {' and '.join(names)} are not GPT-2's, and the class GPT2Tokenizer replaces them, as in "
            "transformers 5; tokenizer_class PreTrainedTokenizerFast keeps them"
        )
    state |= {"normalizer": None, "added_tokens": []}  # the tokens are added again, in the order of their ids
    state["model"] = {**model, **{name: value for name, value in _GPT2_MODEL.items() if model.get(name)}}
    if not _spells_every_byte(model.get("vocab")):
        state["model"]["unk_token"] = None
    return state


def _spells_every_byte(vocab: object) -> bool:
    from tokenizers.pre_tokenizers import ByteLevel

    return isinstance(vocab, dict) and all(letter in vocab for letter in ByteLevel.alphabet())


def _add_tokens(backend: tokenizers.Tokenizer, settings: TokenizerSettings) -> None:
    """Added tokens by their ids, then special tokens that are not among them, as transformers adds them."""
    from tokenizers import AddedToken

    named = {content for content in settings.special.values() if content is not None}
    tokens = [settings.added[number] for number in sorted(settings.added)]
    for token in tokens:
        if token.content in named:
            token.special = True
    known = {token.content for token in (*backend.get_added_tokens_decoder().values(), *tokens)}
    for content in (*settings.special.values(), *settings.additional):
        if content is not None and content not in known:
            tokens.append(settings.flagged.get(content) or AddedToken(content, special=True))
            known.add(content)
    backend.add_tokens(tokens)


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=5)
