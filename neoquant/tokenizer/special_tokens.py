"""Special and added tokens: `bos_token`, `bos_token_id` and the like as attributes that can be set."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from neoquant.errors import RequestError
from neoquant.tokenizer.settings import END_OF_TEXT, EXTRA_TOKENS, SPECIAL_TOKENS, TokenizerSettings
from neoquant.tokenizer.words import missing

if TYPE_CHECKING:
    import tokenizers
    from tokenizers import AddedToken


class SpecialToken:
    """The attribute `x_token`: a token's text, or None. Setting it moves its id."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, tokenizer: None, owner: type) -> SpecialToken: ...
    @overload
    def __get__(self, tokenizer: SpecialTokens, owner: type) -> str | None: ...
    def __get__(self, tokenizer: SpecialTokens | None, owner: type) -> SpecialToken | str | None:
        return self if tokenizer is None else tokenizer.settings.special.get(self._name)

    def __set__(self, tokenizer: SpecialTokens, value: str | None) -> None:
        tokenizer.set_special_token(self._name, value)


class SpecialTokenId:
    """The attribute `x_token_id`: the token's id, or None without a token. Setting it moves the token.

    Raises RequestError where the token is not in the vocabulary, or there is no such id.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name.removesuffix("_id")

    @overload
    def __get__(self, tokenizer: None, owner: type) -> SpecialTokenId: ...
    @overload
    def __get__(self, tokenizer: SpecialTokens, owner: type) -> int | None: ...
    def __get__(self, tokenizer: SpecialTokens | None, owner: type) -> SpecialTokenId | int | None:
        if tokenizer is None:
            return self
        token = tokenizer.settings.special.get(self._name)
        return None if token is None else tokenizer.require_id(token, self._name)

    def __set__(self, tokenizer: SpecialTokens, value: int | None) -> None:
        token = None if value is None else tokenizer.backend.id_to_token(value)
        if value is not None and token is None:
            raise RequestError(f"{self._name}_id is {value}; this tokenizer's ids are 0 to {len(tokenizer) - 1}")
        tokenizer.set_special_token(self._name, token)


class SpecialTokens:
    """The special tokens of a tokenizer, by name and without, and the tokens added to its vocabulary.

    `backend` is the pipeline of the tokenizers library, `settings` all that the folder says beside it. Attributes that
    nothing would read cannot be set.
    """

    backend: tokenizers.Tokenizer
    settings: TokenizerSettings
    name_or_path: str
    """The folder or the id on the hub that it was read from."""

    bos_token = SpecialToken()
    eos_token = SpecialToken()
    unk_token = SpecialToken()
    sep_token = SpecialToken()
    pad_token = SpecialToken()
    cls_token = SpecialToken()
    mask_token = SpecialToken()
    bos_token_id = SpecialTokenId()
    eos_token_id = SpecialTokenId()
    unk_token_id = SpecialTokenId()
    sep_token_id = SpecialTokenId()
    pad_token_id = SpecialTokenId()
    cls_token_id = SpecialTokenId()
    mask_token_id = SpecialTokenId()

    def __init__(self, backend: tokenizers.Tokenizer, settings: TokenizerSettings) -> None:
        set_field = object.__setattr__
        set_field(self, "backend", backend)
        set_field(self, "settings", settings)
        set_field(self, "_sha256", None)
        set_field(self, "_silenced", {})
        set_field(self, "name_or_path", "")

    def __setattr__(self, name: str, value: Any) -> None:
        known = getattr(type(self), name, None)
        if name in self.settings.special and known is None:
            self.set_special_token(name, value)
        elif (
            name == "name_or_path"
            or isinstance(known, SpecialToken | SpecialTokenId)
            or (isinstance(known, property) and known.fset)
        ):
            object.__setattr__(self, name, value)
        elif isinstance(known, property) or name in ("backend", "settings"):
            raise AttributeError(f"a tokenizer's {name} cannot be set: load one with it, from_pretrained(..., {name}=)")
        else:
            raise AttributeError(f"a tokenizer has no setting {name!r}: nothing would read it")

    def __getattr__(self, name: str) -> Any:
        if name not in ("settings", "backend"):  # not there yet while a copy is being made
            for stem, is_id in ((name, False), (name.removesuffix("_id"), True)):
                if stem in self.settings.special:
                    token = self.settings.special[stem]
                    return self.require_id(token, stem) if is_id and token is not None else token
        raise missing(name)

    def __getstate__(self) -> dict[str, Any]:
        return {"backend": self.backend, "settings": self.settings, "name_or_path": self.name_or_path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        name_or_path = state.pop("name_or_path", "")
        SpecialTokens.__init__(self, **state)
        self.name_or_path = name_or_path

    def set_special_token(self, name: str, value: object) -> None:
        """Make a token the `name` ("pad_token" and the like); None for none. It need not be in the vocabulary yet."""
        content = getattr(value, "content", value)
        if content is not None and not isinstance(content, str):
            raise RequestError(f"{name} is {value!r}; legal is a token's text, or None")
        self.settings.special[name] = content
        object.__setattr__(self, "_sha256", None)

    def require_id(self, token: str, name: str = "the token") -> int:
        """The id of `token`. Raises RequestError where the vocabulary has none."""
        found: int | None = self.backend.token_to_id(token)
        if found is None:
            raise RequestError(f"{name} is {token!r}, which is no token of this tokenizer")
        return found

    @property
    def sha256(self) -> str:
        """What identifies the ids that texts become: a hash of the tokenizer.json that would be saved.

        It covers vocabulary, merges, added tokens and every step of the pipeline. The end-of-text token, with which
        evaluation begins, and `split_special_tokens` change it where they are not GPT-2's. Sides, padding, lengths and
        chat templates do not.
        """
        if self._sha256 is None:
            digest = hashlib.sha256(self.backend.to_str().encode())
            if self.eos_token != END_OF_TEXT:
                digest.update(f"\neos_token {self.eos_token}".encode())
            if self.settings.split_special_tokens:
                digest.update(b"\nsplit_special_tokens")
            object.__setattr__(self, "_sha256", digest.hexdigest())
        return str(self._sha256)

    @property
    def additional_special_tokens(self) -> list[str]:
        """Special tokens without a name."""
        return self.settings.additional

    @additional_special_tokens.setter
    def additional_special_tokens(self, tokens: Sequence[str] | None) -> None:
        self.settings.additional = [str(token) for token in tokens or ()]

    extra_special_tokens = additional_special_tokens

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        """Their ids; setting them makes the tokens of these ids the special tokens without a name."""
        return [self.require_id(token) for token in self.settings.additional]

    @additional_special_tokens_ids.setter
    def additional_special_tokens_ids(self, ids: Sequence[int] | None) -> None:
        tokens = [self.backend.id_to_token(number) for number in ids or ()]
        if None in tokens:
            raise RequestError(f"extra_special_tokens_ids are {ids}; this tokenizer's are 0 to {len(self) - 1}")
        self.additional_special_tokens = tokens  # type: ignore[assignment]

    extra_special_tokens_ids = additional_special_tokens_ids

    @property
    def deprecation_warnings(self) -> dict[str, bool]:
        """Where programs say which of transformers' warnings were given, to silence them; there are none here."""
        silenced: dict[str, bool] = self._silenced
        return silenced

    @deprecation_warnings.setter
    def deprecation_warnings(self, given: Mapping[str, bool]) -> None:
        object.__setattr__(self, "_silenced", dict(given))

    @property
    def pad_token_type_id(self) -> int:
        """What `token_type_ids` holds on padding."""
        return 0

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """token -> id of the added tokens."""
        return self.get_added_vocab()

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """name -> token, for the special tokens that there are."""
        return {name: token for name, token in self.settings.special.items() if token is not None}

    @property
    def all_special_tokens(self) -> list[str]:
        """Every special token once."""
        return list(dict.fromkeys((*self.special_tokens_map.values(), *self.settings.additional)))

    @property
    def all_special_ids(self) -> list[int]:
        """Their ids."""
        return [self.require_id(token) for token in self.all_special_tokens]

    def get_special_tokens_mask(
        self, ids: Sequence[int], second: Sequence[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for each of `ids` that is a special token. Raises RequestError for ids without the special tokens."""
        if not already_has_special_tokens or second is not None:
            raise RequestError(
                "special tokens are told apart among the ids of a whole text: call the tokenizer with "
                "return_special_tokens_mask=True, or pass already_has_special_tokens=True with one row of ids"
            )
        special = set(self.all_special_ids)
        return [int(int(number) in special) for number in ids]

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def get_added_vocab(self) -> dict[str, int]:
        """token -> id of the added tokens, by their ids."""
        return {token.content: number for number, token in sorted(self.added_tokens_decoder.items())}

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """id -> token, with its flags, of the added tokens."""
        return self.backend.get_added_tokens_decoder()

    def add_tokens(self, tokens: str | AddedToken | Sequence[str | AddedToken], special_tokens: bool = False) -> int:
        """Add tokens that texts may contain, numbered from the vocabulary's end on. How many were new."""
        several = list(tokens) if isinstance(tokens, list | tuple) else [tokens]
        object.__setattr__(self, "_sha256", None)
        return self.backend.add_special_tokens(several) if special_tokens else self.backend.add_tokens(several)

    def add_special_tokens(
        self,
        tokens: Mapping[str, Any],
        replace_extra_special_tokens: bool = True,
        *,
        replace_additional_special_tokens: bool = True,
    ) -> int:
        """Name special tokens (`{"pad_token": "<pad>"}`), adding those that are new. How many these were.

        A list under "additional_special_tokens" replaces the former one, or goes behind it, where either of
        transformers' two names for that is False. Raises RequestError for another name.
        """
        added: list[Any] = []
        for name, value in tokens.items():
            if name in EXTRA_TOKENS:
                if not isinstance(value, list | tuple):
                    raise RequestError(f"{name} is {value!r:.60}; legal is a list of tokens")
                replaces = replace_extra_special_tokens and replace_additional_special_tokens
                former = [] if replaces else self.settings.additional
                self.additional_special_tokens = list(dict.fromkeys((*former, *map(str, value))))
                added += value
            elif name in SPECIAL_TOKENS:
                self.set_special_token(name, value)
                added.append(value)
            else:
                legal = ", ".join((*SPECIAL_TOKENS, *EXTRA_TOKENS))
                raise RequestError(f"{name!r} is no name of a special token; legal are {legal}")
        return self.add_tokens(added, special_tokens=True)
