"""Transformers' words for generating: which neoquant knows, which values are legal, and which change nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from neoquant.model.stored_states import STORAGES

CACHES = (
    "dynamic",
    "dynamic_full",
    "static",
    "hybrid",
    "offloaded",
    "offloaded_static",
)  # only static is another than dynamic here
MAX = sys.float_info.max

# What transformers also takes and neoquant does in these ways only; None, which is legal for all, leaves it to them.
ONLY: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "penalty_alpha": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "forced_decoder_ids": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "constraints": ([],),
    "dola_layers": (),
    "assistant_early_exit": (),
    "use_mtp": (False,),
    "token_healing": (False,),
    "max_time": (),
    "remove_invalid_values": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "inputs_embeds": (),
    "prefix_allowed_tokens_fn": (),
    "negative_prompt_ids": (),
    "negative_prompt_attention_mask": (),
    "assistant_tokenizer": (),
    "custom_generate": (),
}
_HUB = {
    "penalty_alpha": "contrastive-search",
    "dola_layers": "dola",
    "num_beam_groups": "group-beam-search",
    "diversity_penalty": "group-beam-search",
    "force_words_ids": "constrained-beam-search",
    "constraints": "constrained-beam-search",
}
ON_THE_HUB = {name: f"transformers-community/{repository}" for name, repository in _HUB.items()}
"""What is no longer in transformers itself -> the repository on the hub whose code it runs instead."""
# What changes no id that is generated: about speed, memory, beams that there are none of, or the file itself.
WITHOUT_EFFECT = (
    "use_cache", "cache_config", "max_cache_len", "low_memory", "disable_compile", "compile_config",
    "prefill_chunk_size", "length_penalty", "early_stopping", "renormalize_logits", "is_assistant",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind",
    "target_lookbehind", "max_matching_ngram_size", "continuous_batching_config", "decoder_start_token_id",
    "transformers_version", "eos_token", "generation_kwargs", "synced_gpus", "use_model_defaults", "trust_remote_code",
    "logits_to_keep",
)  # fmt: skip


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -MAX <= value <= MAX


def _are_ids(value: Any) -> bool:
    value = value.tolist() if hasattr(value, "tolist") else value
    return _is_count(value) or (isinstance(value, Sequence) and all(map(_is_count, value)))


def _are_words(value: Any) -> bool:
    return isinstance(value, Sequence) and all(isinstance(each, Sequence) and each and _are_ids(each) for each in value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, Sequence) and all(isinstance(each, str) for each in value))


_SWITCH = (lambda value: isinstance(value, bool), "true or false")
_COUNT = (_is_count, "an integer of 64 bits")
_NUMBER = (_is_number, "a finite number")
LEGAL: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("max_new_tokens", "max_length", "min_new_tokens", "min_length", "top_k"), _COUNT),
    **dict.fromkeys(("prompt_lookup_num_tokens", "no_repeat_ngram_size"), _COUNT),
    **dict.fromkeys(("num_return_sequences", "bos_token_id", "pad_token_id", "seed"), _COUNT),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), _NUMBER),
    **dict.fromkeys(("do_sample", "return_dict_in_generate", "output_scores", "output_logits"), _SWITCH),
    "num_beams": (lambda value: _is_count(value) and value > 0, "an integer of at least 1"),
    "eos_token_id": (_are_ids, "an integer of 64 bits or a list of them"),
    "suppress_tokens": (_are_ids, "an integer of 64 bits or a list of them"),
    "bad_words_ids": (_are_words, "a list of lists of integers, none of them empty"),
    "stop_strings": (_are_texts, "a text or a list of them"),
    "cache_implementation": (lambda value: value in CACHES, " or ".join(CACHES)),
    "cache_dtype": (lambda value: value in STORAGES, " or ".join(STORAGES)),
}


def fault(name: str, value: Any) -> str | None:
    """Why a value is not one of these words', or None."""
    legal, what = LEGAL.get(name, (None, ""))
    return None if legal is None or legal(value) else f"{name} is {value!r}; legal is {what}"
