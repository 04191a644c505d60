"""What can be set on a tokenizer beside its special tokens, and its vocabulary: tokens and ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from neoquant.tokenizer.backend import set_template
from neoquant.tokenizer.settings import require_input_names, require_limit, require_side
from neoquant.tokenizer.special_tokens import SpecialTokens

if TYPE_CHECKING:
    import tokenizers


class Vocabulary(SpecialTokens):
    """Tokens, their ids, and the settings that can be changed."""

    @property
    def padding_side(self) -> str:
        """Where padding goes, "left" or "right"."""
        return self.settings.padding_side

    @padding_side.setter
    def padding_side(self, side: str) -> None:
        self.settings.padding_side = require_side("padding_side", side)

    @property
    def truncation_side(self) -> str:
        """Where tokens are cut off, "left" or "right"."""
        return self.settings.truncation_side

    @truncation_side.setter
    def truncation_side(self, side: str) -> None:
        self.settings.truncation_side = require_side("truncation_side", side)

    @property
    def model_max_length(self) -> int:
        """Tokens that truncation leaves where no `max_length` is given; NO_LIMIT where the folder states none."""
        return self.settings.model_max_length

    @model_max_length.setter
    def model_max_length(self, length: float | None) -> None:
        self.settings.model_max_length = require_limit(length)

    @property
    def model_input_names(self) -> list[str]:
        """The columns that calling the tokenizer gives."""
        return self.settings.model_input_names

    @model_input_names.setter
    def model_input_names(self, names: Sequence[str]) -> None:
        self.settings.model_input_names = require_input_names(names)

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The folder's chat template, or its templates by name: see `apply_chat_template`."""
        return self.settings.chat_template

    @chat_template.setter
    def chat_template(self, template: str | dict[str, str] | None) -> None:
        self.settings.chat_template = template

    @property
    def clean_up_tokenization_spaces(self) -> bool:
        """What the folder says. transformers 5 does not clean up byte-level BPE, and neither does `decode`."""
        return self.settings.clean_up_tokenization_spaces

    @property
    def split_special_tokens(self) -> bool:
        """Whether special tokens in a text are spelled out like any other text."""
        return self.settings.split_special_tokens

    @split_special_tokens.setter
    def split_special_tokens(self, split: bool) -> None:
        self.settings.split_special_tokens = self.backend.encode_special_tokens = bool(split)
        object.__setattr__(self, "_sha256", None)

    @property
    def add_prefix_space(self) -> bool:
        """Whether the class puts a space in front of each text."""
        return self.settings.add_prefix_space

    @property
    def add_bos_token(self) -> bool:
        """Whether `bos_token` is put in front of each text; setting it replaces a template of tokenizer.json."""
        return bool(self.settings.add_bos_token)

    @add_bos_token.setter
    def add_bos_token(self, add: bool) -> None:
        self._set_ends(bool(add), self.add_eos_token)

    @property
    def add_eos_token(self) -> bool:
        """Whether `eos_token` is put behind each text; setting it replaces a template of tokenizer.json."""
        return bool(self.settings.add_eos_token)

    @add_eos_token.setter
    def add_eos_token(self, add: bool) -> None:
        self._set_ends(self.add_bos_token, bool(add))

    def _set_ends(self, bos: bool, eos: bool) -> None:
        set_template(self.backend, self.bos_token if bos else None, self.eos_token if eos else None)
        self.settings.add_bos_token, self.settings.add_eos_token = bos, eos
        object.__setattr__(self, "_sha256", None)

    @property
    def vocab_size(self) -> int:
        """Entries without the added tokens; `len(tokenizer)` counts those too."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    def __bool__(self) -> bool:
        return True

    def get_vocab(self) -> dict[str, int]:
        """token -> id, added tokens included."""
        return self.backend.get_vocab(with_added_tokens=True)

    vocab = property(get_vocab)
    is_fast = True
    """Whether it is one of the library `tokenizers`, as transformers asks."""

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many special tokens are added to a text, or a pair of texts."""
        return self.backend.num_special_tokens_to_add(pair)

    @property
    def max_len_single_sentence(self) -> int:
        """How many tokens of a text `model_max_length` has room for, beside special ones."""
        return self.model_max_length - self.num_special_tokens_to_add()

    @property
    def max_len_sentences_pair(self) -> int:
        """The same for a pair of texts."""
        return self.model_max_length - self.num_special_tokens_to_add(pair=True)

    @property
    def backend_tokenizer(self) -> tokenizers.Tokenizer:
        """`backend`, by transformers' name."""
        return self.backend

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id of each token; `unk_token`'s for one that is not in the vocabulary, None without an `unk_token`."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        found: int | None = self.backend.token_to_id(tokens)
        return self.unk_token_id if found is None else found

    def convert_ids_to_tokens(self, ids: int | Sequence[int] | torch.Tensor, skip_special_tokens: bool = False) -> Any:
        """Each id's entry in the vocabulary, where bytes are spelled as letters; None for an id that there is not."""
        if isinstance(ids, int):
            return self.backend.id_to_token(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [self.backend.id_to_token(int(i)) for i in ids if int(i) not in skipped]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text that tokens spell."""
        decoder = self.backend.decoder
        return " ".join(tokens) if decoder is None else decoder.decode(list(tokens))
