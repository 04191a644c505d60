"""What transformers' tokenizers have and these have not, and the way to do it: answers in place of bare errors."""

from __future__ import annotations

from collections.abc import Iterable

from neoquant.errors import RequestError

_AROUND = "special tokens are put around texts: call the tokenizer with them, add_special_tokens=True"
_SLOW = "it is of transformers' slow tokenizers; vocab.json and merges.txt become tokenizer.json by save_pretrained"
_ATTRIBUTES = {
    "build_inputs_with_special_tokens": _AROUND,
    "create_token_type_ids_from_sequences": f"{_AROUND}, return_token_type_ids=True",
    "prepare_for_model": f"{_AROUND}; what was encoded already is padded by pad()",
    "truncate_sequences": "texts are truncated as they are encoded: truncation=True, max_length=, stride=",
    "prepare_seq2seq_batch": "call the tokenizer with text and text_target, padding=True, return_tensors='pt'",
    "as_target_tokenizer": "call the tokenizer with text_target=",
    "get_chat_template": "chat_template is the template; apply_chat_template(chat_template=) takes another",
    "parse_response": "it is transformers' own, for templates that say how to read what a model answers",
    "save_vocabulary": "save_pretrained writes the vocabulary, in tokenizer.json; get_vocab() gives it",
    "clean_up_tokenization": "decode(clean_up_tokenization_spaces=) does what is to be done",
    "sanitize_special_tokens": "add_special_tokens adds those that are new",
    "all_special_tokens_extended": "all_special_tokens gives the texts, added_tokens_decoder the flags",
    "bpe": _SLOW,
    "byte_encoder": _SLOW,
    "byte_decoder": _SLOW,
    "bpe_ranks": _SLOW,
    "encoder": "get_vocab() gives token -> id",
    "decoder": "convert_ids_to_tokens gives the token of an id, backend.decoder is the library's",
}
"""Attribute -> how it is done here."""

_OPTIONS = {
    "add_prefix_space": "load the tokenizer with it, from_pretrained(..., add_prefix_space=True)",
    "max_target_length": "call it twice: once with text, once with text_target",
    "truncate": "truncation=True cuts off what is longer than max_length",
    "legacy_format": "tokenizer.json is written, which transformers 4 and 5 read; vocab.json and merges.txt are not",
    "filename_prefix": "files have the names by which they are found; copy them to others",
    "truncation_strategy": "truncation='longest_first', 'only_first' or 'only_second'",
    "pad_to_max_length": "padding='max_length'",
}
"""Option of a call -> how it is done here."""


class NotHereError(RequestError, AttributeError):
    """An attribute that only transformers' tokenizers have. An AttributeError, too, so that `hasattr` says no."""


def missing(name: str) -> AttributeError:
    """What to raise for an attribute that there is not."""
    if name in _ATTRIBUTES:
        return NotHereError(f"a tokenizer has no {name!r} here: {_ATTRIBUTES[name]}")
    return AttributeError(f"a tokenizer has no attribute {name!r}")


def refuse_options(call: str, names: Iterable[str], legal: Iterable[str]) -> None:
    """Raise RequestError for the first of `names`, options of a method, that is not `legal`."""
    known = set(legal)
    for name in names:
        if name not in known:
            answer = _OPTIONS.get(name, f"legal are {', '.join(sorted(known))}")
            raise RequestError(f"{call} has no option {name!r}: {answer}")
