"""What transformers 4.57 does otherwise with folders of the zoo: name -> why. neoquant follows transformers 5.

Where these tests run beside transformers 4, such a folder is skipped with its reason, and all others are compared.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest

MODELS = {
    "attention_layers alone": "it reads attention_types only, and refuses the folder",
    "tied, another head": "it ties the head all the same",
    "silent about the tie, another head": "it ties the head all the same",
    "only the head": "it leaves the embedding without a value",
}

_TOKEN_TYPES = "it gives token_type_ids where tokenizer_config.json names no model_input_names"
_ADDITIONAL = "its special_tokens_map holds the additional special tokens"
_PIPELINE = "its GPT2Tokenizer leaves the pipeline as tokenizer.json has it"
TOKENIZERS = {
    "fast class": _TOKEN_TYPES,
    "fast class without an end of text": _TOKEN_TYPES,
    "fast class, added_tokens_decoder": _TOKEN_TYPES,
    "fast class, decoder without the file's tokens": _TOKEN_TYPES,
    "fast class, flags": _TOKEN_TYPES,
    "fast class, named extra tokens": _TOKEN_TYPES,
    "fast class, template": _TOKEN_TYPES,
    "fast class, template with both ends": _TOKEN_TYPES,
    "fast class, sides left in the file": _TOKEN_TYPES,
    "fast class, normalizer": _TOKEN_TYPES,
    "fast class, split digits": _TOKEN_TYPES,
    "fast class, unknown bytes": _TOKEN_TYPES,
    "fast class, words": _TOKEN_TYPES,
    "fast class, tokenizer.json with a prefix space": "it takes the prefix space from tokenizer_config.json",
    "fast class, add_prefix_space": "it takes the prefix space from tokenizer_config.json",
    "fast class, extra_special_tokens": "it refuses a list of extra_special_tokens",
    "fast class, a token under its own name": "it makes no token of it",
    "transformers 5's class": "it does not know that class",
    "slow, additional_special_tokens": _ADDITIONAL,
    "fast, additional_special_tokens": _ADDITIONAL,
    "slow, add_bos_token": "it puts no token in front of the second text of a pair",
    "slow, add_eos_token": "its GPT2Tokenizer has no add_eos_token",
    "slow, both ends": "its GPT2Tokenizer has no add_eos_token",
    "fast, decoder without the file's tokens": "it keeps the tokens that only tokenizer.json names",
    "fast, sides left in the file": "it adds the padding token of tokenizer.json",
    "fast, normalizer": _PIPELINE,
    "fast, split digits": _PIPELINE,
    "fast, unknown bytes": _PIPELINE,
    "fast, clean up": "it cleans up spaces, which for byte-level BPE changes the text",
}


def skip_if_otherwise(name: str, known: Mapping[str, str]) -> None:
    """Skip the running test where the installed transformers is 4 and known to differ."""
    transformers = pytest.importorskip("transformers")
    if name in known and transformers.__version__.startswith("4."):
        pytest.skip(f"transformers {transformers.__version__} differs: {known[name]}")
