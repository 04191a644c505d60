"""Texts as token ids: what calling a tokenizer gives, padded where asked, as lists or tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from typing_extensions import Self

from neoquant.errors import RequestError
from neoquant.sizes import plural
from neoquant.tokenizer.settings import NO_LIMIT, require_side

if TYPE_CHECKING:
    import tokenizers

TENSORS = ("pt", "np")
# What stands on padding, by column.
FILLERS: dict[str, Any] = {
    "attention_mask": 0,
    "token_type_ids": 0,
    "special_tokens_mask": 1,
    "offset_mapping": (0, 0),
}
_PADDING = (False, "do_not_pad", True, "longest", "max_length")
_STRATEGIES = ("longest_first", "only_first", "only_second")
_TRUNCATION = (None, False, "do_not_truncate", True, *_STRATEGIES)


class TokenSpan(NamedTuple):
    """Where something begins, and the place behind its end."""

    start: int
    end: int


def _span(found: tuple[int, int] | None) -> TokenSpan | None:
    return None if found is None else TokenSpan(*found)


class BatchEncoding(dict[str, Any]):
    """`input_ids` and `attention_mask` (0 on padding), reached as keys or attributes; `**encoding` feeds a model.

    Tensors are int64 `[B, T]`. Without `return_tensors` they are lists, of one text a flat one. What a tokenizer gives
    also knows where tokens come from: `encodings`, one a row, padded as the row is, are the library's own.
    """

    encodings: list[tokenizers.Encoding] | None = None

    def tokens(self, row: int = 0) -> list[str]:
        """A row's tokens, as the vocabulary spells them."""
        return self.encoding(row).tokens

    def word_ids(self, row: int = 0) -> list[int | None]:
        """Which word of its text each token of a row is of; None for special tokens and padding."""
        return self.encoding(row).word_ids

    def sequence_ids(self, row: int = 0) -> list[int | None]:
        """Whether each token of a row is of the first text, 0, or the second, 1; None for special ones and padding."""
        encoding = self.encoding(row)
        known = zip(encoding.sequence_ids, encoding.type_ids, encoding.special_tokens_mask, strict=True)
        # In rows of what was cut off, the library has forgotten it where no template puts tokens around texts.
        return [None if special else kind if number is None else number for number, kind, special in known]

    words = word_ids
    """transformers' older name."""

    def char_to_token(self, row_or_char: int, char: int | None = None, sequence_index: int = 0) -> int | None:
        """The place of the token that a character of a text is in: of the only row, or of a row; None for none."""
        found: int | None = self._aligned("char_to_token", row_or_char, char, sequence_index)
        return found

    def char_to_word(self, row_or_char: int, char: int | None = None, sequence_index: int = 0) -> int | None:
        """The number of the word that a character is in."""
        found: int | None = self._aligned("char_to_word", row_or_char, char, sequence_index)
        return found

    def token_to_chars(self, row_or_token: int, token: int | None = None) -> TokenSpan | None:
        """Where the token at a place begins and ends in its text, of the only row, or of a row; None for none."""
        row, place = (0, row_or_token) if token is None else (row_or_token, token)
        return _span(self.encoding(row).token_to_chars(place))

    def token_to_word(self, row_or_token: int, token: int | None = None) -> int | None:
        """The number of the word that the token at a place is in."""
        found: int | None = self._aligned("token_to_word", row_or_token, token)
        return found

    def token_to_sequence(self, row_or_token: int, token: int | None = None) -> int | None:
        """Whether the token at a place is of the first text, 0, or the second, 1."""
        row, place = (0, row_or_token) if token is None else (row_or_token, token)
        return self.sequence_ids(row)[place]

    def word_to_tokens(self, row_or_word: int, word: int | None = None, sequence_index: int = 0) -> TokenSpan | None:
        """From where to where the tokens of a word are; None for none."""
        return _span(self._aligned("word_to_tokens", row_or_word, word, sequence_index))

    def word_to_chars(self, row_or_word: int, word: int | None = None, sequence_index: int = 0) -> TokenSpan | None:
        """From where to where a word is in its text; None for none."""
        return _span(self._aligned("word_to_chars", row_or_word, word, sequence_index))

    def _aligned(self, method: str, row_or_place: int, place: int | None, *more: int) -> Any:
        """What the library's method says of a place in the only row, or in a row."""
        row, at = (0, row_or_place) if place is None else (row_or_place, place)
        return getattr(self.encoding(row), method)(at, *more)

    def encoding(self, row: int = 0) -> tokenizers.Encoding:
        """The library's own, of a row. Raises RequestError where there is none."""
        if self.encodings is None:
            raise RequestError("only what a tokenizer gave for texts knows where tokens come from")
        return self.encodings[row]

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"an encoding of {', '.join(self)} has no {name!r}") from None

    def to(self, device: torch.device | str | int) -> Self:
        """Move every tensor to `device`, and return this encoding."""
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                self[name] = value.to(device)
        return self


class Lengths(NamedTuple):
    """How texts are truncated and padded.

    Attributes:
        strategy: which text of a pair is truncated; None for neither.
        truncated: tokens that are left, special tokens included.
        padded: "longest" to the longest text, a number to that many tokens; None for no padding.
        multiple: padded lengths are multiples of it.
        stride: tokens that what is cut off has of the row before.
    """

    strategy: str | None
    truncated: int
    padded: str | int | None
    multiple: int | None
    stride: int = 0


def lengths(
    padding: bool | str,
    truncation: bool | str | None,
    max_length: int | None,
    limit: int,
    multiple: int | None = None,
    stride: int = 0,
    special: int = 0,
) -> Lengths:
    """The arguments `padding`, `truncation`, `max_length` and `pad_to_multiple_of` in transformers' meaning.

    `max_length` alone truncates. Where no `max_length` is given, `limit` (the tokenizer's `model_max_length`) is meant;
    where that is NO_LIMIT, nothing is truncated, or padded to it. What is cut off goes on in rows that begin with the
    last `stride` tokens of the one before, with `special` tokens around each. Raises RequestError for illegal values.
    """
    for name, value, legal in (("padding", padding, _PADDING), ("truncation", truncation, _TRUNCATION)):
        if value not in legal:
            raise RequestError(f"{name} is {value!r}; legal are {', '.join(map(repr, legal))}")
    for name, number, least in (("max_length", max_length, 0), ("pad_to_multiple_of", multiple, 1)):
        if number is not None and (not isinstance(number, int) or number < least):
            raise RequestError(f"{name} is {number!r}; legal is a number of tokens, at least {least}")
    if truncation is None and padding is False and max_length is not None:
        truncation = True
    strategy = {True: "longest_first", False: None, None: None, "do_not_truncate": None}.get(truncation, truncation)
    padded: str | int | None = {True: "longest", False: None, "do_not_pad": None}.get(padding, padding)
    unlimited = max_length is None and limit >= NO_LIMIT
    length = limit if max_length is None else max_length
    if unlimited:
        strategy = None
    if strategy is not None and not 0 <= stride < max(1, length - special):
        raise RequestError(f"stride is {stride}; legal is 0 to less than the {length - special} tokens of a row")
    if padded == "max_length":
        padded = None if unlimited else length
    if strategy is not None and padded is not None and multiple is not None and length % multiple:
        raise RequestError(f"texts truncated to {plural(length, 'token')} cannot be padded to a multiple of {multiple}")
    return Lengths(str(strategy) if strategy else None, length, padded, multiple, stride)


@contextmanager
def truncating(backend: tokenizers.Tokenizer, wanted: Lengths, side: str) -> Iterator[None]:
    """Let the library truncate on `side` while this lasts. Raises RequestError for texts too short to be truncated.

    The library keeps this in the tokenizer itself: one that threads share must not truncate in several at once.
    """
    if wanted.strategy is None:
        yield
        return
    backend.enable_truncation(wanted.truncated, stride=wanted.stride, strategy=wanted.strategy, direction=side)
    try:
        yield
    except Exception as error:  # the library raises nothing more precise
        raise RequestError(f"{error} (truncation={wanted.strategy!r}, max_length={wanted.truncated})") from None
    finally:
        backend.no_truncation()


def padded_columns(
    columns: Mapping[str, list[list[Any]]], wanted: Lengths, pad_id: int, side: str
) -> dict[str, list[list[Any]]]:
    """Every row of every column padded on `side`; unchanged where `wanted` has no padding."""
    if wanted.padded is None:
        return dict(columns)
    longest = max((len(row) for row in columns["input_ids"]), default=0)
    width = longest if wanted.padded == "longest" else int(wanted.padded)
    width += -width % (wanted.multiple or 1)
    fillers = {"input_ids": pad_id, **FILLERS}
    return {name: pad(rows, width, fillers[name], side) for name, rows in columns.items()}


def pad(rows: Sequence[Sequence[Any]], width: int, filler: Any, side: str) -> list[list[Any]]:
    """Each row with `filler` on its `side` until it is `width` long."""
    require_side("padding_side", side)
    padded = []
    for row in rows:
        filling = [filler] * (width - len(row))
        padded.append([*filling, *row] if side == "left" else [*row, *filling])
    return padded


def as_tensors(columns: Mapping[str, list[Any]], kind: str) -> BatchEncoding:
    """Rows of equal length as tensors. Raises RequestError for rows of several lengths, or another `kind`."""
    if kind not in TENSORS:
        raise RequestError(f"return_tensors is {kind!r}; legal are {', '.join(TENSORS)} and None")
    widths = sorted({len(row) for row in columns["input_ids"]})
    if len(widths) > 1:
        raise RequestError(
            f"texts of {widths[0]} to {widths[-1]} tokens make no tensor: pass padding=True, or truncation"
        )
    tensors = {name: torch.tensor(rows, dtype=torch.int64) for name, rows in columns.items()}
    return BatchEncoding(tensors if kind == "pt" else {name: tensor.numpy() for name, tensor in tensors.items()})
