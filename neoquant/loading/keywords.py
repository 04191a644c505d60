"""transformers' other keywords of `from_pretrained`: which change nothing here, and what does what the others do there.

Code that was written for transformers runs as it stands where a keyword asks for nothing that is not done here, and is
told the way where it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from neoquant.checkpoint.keywords import ANSWERED as HUB_ANSWERED
from neoquant.checkpoint.keywords import WITHOUT_EFFECT as HUB_WITHOUT_EFFECT
from neoquant.checkpoint.keywords import Answers, require_neutral
from neoquant.errors import RequestError
from neoquant.model.config import GPTNeoConfig

WITHOUT_EFFECT = (
    *HUB_WITHOUT_EFFECT, "low_cpu_mem_usage", "use_safetensors", "use_kernels", "offload_folder",
    "offload_state_dict", "offload_buffers", "experts_implementation", "_fast_init",
)  # fmt: skip
"""How transformers looks for code, reads files and shows progress."""

_INSIDE = "neoquant.transformers.from_pretrained takes it"
_THEIRS = (
    "adapter_kwargs", "allow_all_kernels", "device_mesh", "distributed_config", "fusion_config", "generation_config",
    "kernel_config", "key_mapping", "tp_plan", "tp_size",
)  # fmt: skip
ANSWERED: Answers = {
    **HUB_ANSWERED,
    "state_dict": ((None,), "load the folder, then call load_state_dict"),
    "gguf_file": ((None,), f"GGUF is not read here; {_INSIDE}"),
    "from_tf": ((None, False), "weights of TensorFlow are not read"),
    "from_flax": ((None, False), "weights of Flax are not read; neoquant.jax runs quantized folders"),
    "weights_only": ((None, True), "pickles are read without running what they hold, always"),
    "load_in_4bit": ((None, False), 'quantization_config={"load_in_4bit": True} asks for it'),
    "load_in_8bit": ((None, False), 'quantization_config={"load_in_8bit": True} asks for it'),
    "ignore_mismatched_sizes": ((None, False), f"a head of another size is drawn anew by a fresh model; {_INSIDE}"),
    **dict.fromkeys(_THEIRS, ((None,), f"it is made for what only transformers does; {_INSIDE}")),
    "adapter_name": ((None, "default"), "neoquant.load_peft_model loads adapters"),
    "disable_mmap": ((None, False), "mmap=False copies weights into memory"),
}  # fmt: skip
"""Keyword -> values that ask for nothing, and how what the others ask for is done."""

OVERRIDES = (
    "use_cache", "return_dict", "output_attentions", "output_hidden_states", "resid_dropout", "embed_dropout",
    "attention_dropout", "classifier_dropout", "pad_token_id",
)  # fmt: skip
"""Settings of config.json that leave what the weights compute as it is."""

_SETTINGS = {field.name for field in fields(GPTNeoConfig)} - {"extra"}


def overrides(others: Mapping[str, Any]) -> dict[str, Any]:
    """What of these keywords counts before config.json; None leaves that as it is.

    Raises RequestError for a keyword that asks for what is not done here, or that there is not.
    """
    _require_nothing({name: value for name, value in others.items() if name not in OVERRIDES})
    return {name: others[name] for name in OVERRIDES if others.get(name) is not None}


def _require_nothing(others: Mapping[str, Any]) -> None:
    for name, value in others.items():
        if name in WITHOUT_EFFECT:
            continue
        if name in ANSWERED:
            require_neutral(name, value, ANSWERED)
        elif name in _SETTINGS:
            raise RequestError(f"{name} is a setting of config.json: change it there; {_INSIDE}")
        else:
            raise RequestError(f"from_pretrained has no keyword {name!r}; those of transformers' own: {_INSIDE}")
