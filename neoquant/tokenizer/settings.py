"""What the files beside a vocabulary say about a tokenizer, read in the order that transformers 5 reads them.

`tokenizer_config.json` comes first. Where it has no `added_tokens_decoder`, `special_tokens_map.json` overrides it, and
the added tokens are those of `added_tokens.json` and of `tokenizer.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from neoquant.errors import CheckpointError, RequestError
from neoquant.files.reading import MAX_LARGE_BYTES, check_size, parse_json
from neoquant.tokenizer.bounds import MAX_TOKEN

if TYPE_CHECKING:
    from tokenizers import AddedToken

END_OF_TEXT = "<|endoftext|>"
NO_LIMIT = int(1e30)
"""`model_max_length` of a tokenizer that states none, as transformers has it."""
SIDES = ("left", "right")
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA_TOKENS = ("extra_special_tokens", "additional_special_tokens")
INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids")
FAST, SLOW_VOCAB, SLOW_MERGES = "tokenizer.json", "vocab.json", "merges.txt"

# True: rebuilt as GPT-2's; False: tokenizer.json as it stands. transformers 5 writes TokenizersBackend.
_CLASSES = {
    "GPT2Tokenizer": True,
    "PreTrainedTokenizer": False,
    "PreTrainedTokenizerFast": False,
    "TokenizersBackend": False,
}
_OPTIONS = (
    *("padding_side", "truncation_side", "model_max_length", "model_input_names", "chat_template"),
    *("clean_up_tokenization_spaces", "split_special_tokens", "add_bos_token", "add_eos_token", "add_prefix_space"),
)
# Paths of one machine, and what other keys and files of a saved tokenizer hold.
_NOT_KEPT = (
    *("name_or_path", "tokenizer_file", "special_tokens_map_file", "vocab_file", "merges_file", "max_len"),
    *("device_map", "slow_tokenizer_class", "init_inputs", "tokenizer_class", "added_tokens_decoder"),
)
_CORRUPTING_CLEAN_UP = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
_T = TypeVar("_T")
SIDED = ("padding_side", "truncation_side")
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("do_lower_case", "from_slow", "legacy"), (None, False)),
    "errors": (None, "replace"),
    "verbose": (None, False, True),
}
"""Settings of other tokenizers that are common in code for any -> values that ask for nothing."""


@dataclass
class TokenizerSettings:
    """A tokenizer's settings, beside its vocabulary.

    Attributes:
        gpt2: whether the class is GPT2Tokenizer, whose pipeline is GPT-2's whatever tokenizer.json says.
        special: name -> content of `bos_token` and the like; a folder may add names of its own.
        additional: special tokens without a name.
        add_bos_token: whether `bos_token` is put in front of each text; None where nothing says so.
        add_eos_token: the same of `eos_token` behind it.
        added: id -> token, for the tokens that are added to the vocabulary, as the files state them.
        clean_up: remove spaces before punctuation from decoded text. transformers does not for BPE, unless forced.
        others: keys of tokenizer_config.json that mean nothing here, kept for `save_pretrained`.
    """

    gpt2: bool = True
    special: dict[str, str | None] = field(default_factory=dict)
    additional: list[str] = field(default_factory=list)
    padding_side: str = "right"
    truncation_side: str = "right"
    model_max_length: int = NO_LIMIT
    model_input_names: list[str] = field(default_factory=lambda: ["input_ids", "attention_mask"])
    chat_template: str | dict[str, str] | None = None
    clean_up_tokenization_spaces: bool = False
    clean_up: bool = False
    split_special_tokens: bool = False
    add_prefix_space: bool = False
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    added: dict[int, AddedToken] = field(default_factory=dict)
    flagged: dict[str, AddedToken] = field(default_factory=dict)
    """content -> token, for special tokens that are given with their flags"""
    others: dict[str, Any] = field(default_factory=dict)


def read_settings(folder: Path, fast: Mapping[str, Any] | None, given: Mapping[str, Any]) -> TokenizerSettings:
    """The settings of a folder.

    Args:
        folder: holds tokenizer_config.json and the like; none of them is needed.
        fast: the content of tokenizer.json; None where there is none.
        given: settings that come before those of the files, by the names of tokenizer_config.json.

    Raises:
        CheckpointError: a file is unreadable, or says what is not legal.
        RequestError: `given` names a setting that there is not, or a side.
    """
    given = {name: value for name, value in given.items() if name not in _NEUTRAL or value not in _NEUTRAL[name]}
    for name in given:
        if name not in (*SPECIAL_TOKENS, *EXTRA_TOKENS, *_OPTIONS):
            legal = ", ".join((*SPECIAL_TOKENS, EXTRA_TOKENS[1], *_OPTIONS))
            raise RequestError(f"a tokenizer has no setting {name!r}; it has {legal}")
        if name in SIDED:
            require_side(name, given[name])
    stated = read_object(folder / "tokenizer_config.json")
    gpt2 = _is_gpt2(folder, stated)
    if fast is not None:  # its post-processor has the last word
        for name in ("add_bos_token", "add_eos_token"):
            stated.pop(name, None)
    stated |= {"chat_template": template} if (template := _chat_template_files(folder)) is not None else {}
    stated |= given
    added = _added_tokens(folder, stated, fast, given)
    if gpt2:
        stated = {**dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT), "pad_token": None, **stated}
    if fast is not None:
        stated = {**_left_in_file(fast), **stated}
    settings = TokenizerSettings(gpt2=gpt2, added=added)
    _take_special_tokens(settings, stated)
    _take_options(settings, stated)
    managed = {*settings.special, *SPECIAL_TOKENS, *EXTRA_TOKENS, *_OPTIONS, *_NOT_KEPT}
    settings.others = {name: value for name, value in stated.items() if name not in managed}
    return settings


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of a file; empty where there is no such file. Raises CheckpointError for anything else."""
    if not path.exists():
        return {}
    try:
        check_size(path, MAX_LARGE_BYTES)
        value = parse_json(path.read_text("utf-8-sig"))
    except CheckpointError as error:
        raise CheckpointError(f"{path.name} {error}") from None
    except RequestError:  # see read_bytes
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} is not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} holds JSON of type {type(value).__name__}, where an object is needed")
    return value


def as_token(value: object, what: str, special: bool | None = None) -> AddedToken:
    """A token as these files spell it: a string, or an object around `content`. Raises CheckpointError."""
    from tokenizers import AddedToken

    if isinstance(value, AddedToken):
        return value
    if isinstance(value, str):
        return AddedToken(value, special=True)
    if not isinstance(value, Mapping) or not isinstance(value.get("content"), str):
        raise CheckpointError(f"{what} is {value!r}; legal is a string, or an object with a string as its content")
    flags = {name: value[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if name in value}
    special = bool(value.get("special", False)) if special is None else special
    try:
        return AddedToken(value["content"], special=special, **flags)
    except TypeError:
        raise CheckpointError(f"{what} is {dict(value)!r}; its flags are true or false") from None


def _is_gpt2(folder: Path, stated: Mapping[str, Any]) -> bool:
    """Whether the class that transformers would take is GPT2Tokenizer, the one of GPT-Neo where no file names one."""
    for name, values in (
        ("tokenizer_config.json", stated),
        ("config.json", read_object(folder / "config.json")),
    ):
        found = values.get("tokenizer_class")
        if found is None:
            continue
        kind = _CLASSES.get(found, _CLASSES.get(found.removesuffix("Fast"))) if isinstance(found, str) else None
        if kind is None:
            raise CheckpointError(
                f"{name}: tokenizer_class is {found!r}, which builds its own pipeline; legal are {', '.join(_CLASSES)} "
                "(PreTrainedTokenizerFast takes tokenizer.json as it stands)"
            )
        return kind
    return True


def _chat_template_files(folder: Path) -> str | dict[str, str] | None:
    """Chat templates that have files of their own; they come before the one in tokenizer_config.json."""
    found = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (main := folder / "chat_template.jinja").exists():
        found["default"] = main
    try:
        texts = {name: path.read_text("utf-8") for name, path in found.items()}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"a chat template is not readable as text: {error}") from None
    return texts["default"] if texts.keys() == {"default"} else texts or None


def _added_tokens(
    folder: Path, stated: dict[str, Any], fast: Mapping[str, Any] | None, given: Mapping[str, Any]
) -> dict[int, AddedToken]:
    """id -> token. Without `added_tokens_decoder`, special_tokens_map.json is worked into `stated` first."""
    decoder = stated.get("added_tokens_decoder")
    if decoder is not None:
        what = "tokenizer_config.json: added_tokens_decoder"
        return {_id(number, what): as_token(token, what) for number, token in _mapping(decoder, what).items()}
    for name, value in read_object(folder / "special_tokens_map.json").items():
        if not given.get(name):
            stated[name] = as_token(value, name, special=True) if _is_token(value) else value
    special = {as_token(stated[name], name).content for name in SPECIAL_TOKENS if stated.get(name)}
    special |= {token.content for token in _additional(stated)}
    added: dict[int, AddedToken] = {}
    from tokenizers import AddedToken

    for content, number in read_object(folder / "added_tokens.json").items():
        is_special = content in special
        what = "added_tokens.json"
        added[_id(number, what)] = AddedToken(content, normalized=not is_special, special=is_special)
    for token in added_in_file(fast):
        added[_id(token["id"], FAST)] = as_token(token, f"{FAST}: an added token")
    return added


def added_in_file(fast: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """What tokenizer.json lists as added tokens. Raises CheckpointError for anything but objects with an id."""
    tokens = (fast or {}).get("added_tokens") or []
    if not isinstance(tokens, list):
        raise CheckpointError(f"{FAST}: added_tokens is {tokens!r:.100}; legal is a list")
    for token in tokens:
        if not isinstance(token, Mapping) or not {"id", "content"} <= token.keys():
            raise CheckpointError(f"{FAST}: an added token is {token!r:.100}; legal is an object with id and content")
    return tokens


def _take_special_tokens(settings: TokenizerSettings, stated: Mapping[str, Any]) -> None:
    """Named tokens, those under names of the folder's own too, and the additional ones."""
    named = {name: stated[name] for name in SPECIAL_TOKENS if name in stated}
    named |= {
        name: value
        for name, value in stated.items()
        if name.endswith("_token") and name not in SPECIAL_TOKENS and (isinstance(value, str) or _is_token(value))
    }
    extra = stated.get("extra_special_tokens")
    named |= extra if isinstance(extra, Mapping) else {}
    for name, value in named.items():
        token = None if value is None else as_token(value, f"tokenizer_config.json: {name}", special=True)
        settings.special[name] = None if token is None else token.content
        if token is not None and not isinstance(value, str):
            settings.flagged[token.content] = token
    additional = _additional(stated)
    settings.additional = [token.content for token in additional]
    settings.flagged |= {token.content: token for token in additional}


def _additional(stated: Mapping[str, Any]) -> list[AddedToken]:
    extra, additional = (stated.get(name) or [] for name in EXTRA_TOKENS)
    values = additional if isinstance(extra, Mapping) or not extra else extra
    if not isinstance(values, list | tuple):
        raise CheckpointError(f"tokenizer_config.json: additional_special_tokens is {values!r}; legal is a list")
    return [as_token(value, "an additional special token", special=True) for value in values]


def _take_options(settings: TokenizerSettings, stated: Mapping[str, Any]) -> None:
    """Everything but tokens. Raises CheckpointError for values that are not legal."""
    for name in SIDED:
        setattr(settings, name, require_side(name, stated.get(name, "right"), CheckpointError))
    for name in ("clean_up_tokenization_spaces", "split_special_tokens", "add_prefix_space"):
        setattr(settings, name, _typed(name, stated.get(name) or False, bool))
    for name in ("add_bos_token", "add_eos_token"):
        if stated.get(name) is not None:
            setattr(settings, name, _typed(name, stated[name], bool))
    settings.clean_up = settings.clean_up_tokenization_spaces and bool(stated.get(_CORRUPTING_CLEAN_UP))
    limit = stated.get("model_max_length", stated.get("max_len"))
    settings.model_max_length = require_limit(limit, CheckpointError)
    names = stated.get("model_input_names") or settings.model_input_names
    settings.model_input_names = require_input_names(names, CheckpointError)
    template = stated.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template if isinstance(entry, dict)}
    settings.chat_template = template


def require_side(name: str, value: object, error: type[Exception] = RequestError) -> str:
    """`value` where it is a side; raises `error` where not."""
    if value not in SIDES:
        raise error(f"{name} is {value!r}; legal are {' and '.join(SIDES)}")
    return str(value)


def require_limit(value: object, error: type[Exception] = RequestError) -> int:
    """A `model_max_length`, NO_LIMIT for None; raises `error` for what is none."""
    if value is None:
        return NO_LIMIT
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= 2 * NO_LIMIT:
        raise error(f"model_max_length is {value!r}; legal is a number of tokens, at least 1")
    return int(value)


def require_input_names(value: object, error: type[Exception] = RequestError) -> list[str]:
    """`model_input_names` where they are names of columns; raises `error` where not."""
    if not isinstance(value, list | tuple) or not value or any(name not in INPUT_NAMES for name in value):
        raise error(f"model_input_names is {value!r}; legal is a list of {', '.join(INPUT_NAMES)}")
    if value[0] != INPUT_NAMES[0]:
        raise error(f"model_input_names is {value!r}; {INPUT_NAMES[0]} comes first")
    return [str(name) for name in value]


def _left_in_file(fast: Mapping[str, Any]) -> dict[str, Any]:
    """What the truncation and padding that training left in tokenizer.json say beyond lengths."""
    found: dict[str, Any] = {}
    if isinstance(truncation := fast.get("truncation"), dict) and "direction" in truncation:
        found["truncation_side"] = str(truncation["direction"]).lower()
    if isinstance(padding := fast.get("padding"), dict):
        found |= {"padding_side": str(padding["direction"]).lower()} if "direction" in padding else {}
        found |= {"pad_token": padding["pad_token"]} if "pad_token" in padding else {}
    return found


def _is_token(value: object) -> bool:
    from tokenizers import AddedToken

    return isinstance(value, AddedToken) or (isinstance(value, Mapping) and "content" in value)


def _mapping(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{what} is {value!r}; legal is an object")
    return value


def _id(value: object, what: str) -> int:
    number: int
    try:
        number = int(value)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        number = -1
    if not 0 <= number <= MAX_TOKEN:
        raise CheckpointError(f"{what}: {value!r:.100} is no token id; legal is an integer of 0 to {MAX_TOKEN:,}")
    return number


def _typed(name: str, value: _T, kind: type[_T]) -> _T:
    if not isinstance(value, kind):
        raise CheckpointError(f"tokenizer_config.json: {name} is {value!r}; legal is a {kind.__name__}")
    return value
