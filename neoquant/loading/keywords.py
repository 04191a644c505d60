"""transformers' other keywords of `from_pretrained`: which change nothing here, and what does what the others do there.

Code that was written for transformers runs as it stands where a keyword asks for nothing that is not done here, and is
told the way where it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from neoquant.errors import RequestError
from neoquant.model.config import GPTNeoConfig

WITHOUT_EFFECT = (
    "trust_remote_code", "low_cpu_mem_usage", "use_safetensors", "use_fast", "use_kernels", "offload_folder",
    "offload_state_dict", "offload_buffers", "resume_download", "tqdm_class", "experts_implementation",
)  # fmt: skip
"""How transformers looks for code, reads files and shows progress."""

_INSIDE = "neoquant.transformers.from_pretrained takes it"
_LOGIN = "set HF_TOKEN, or log in with `hf auth login`"
_THEIRS = (
    "adapter_kwargs", "allow_all_kernels", "device_mesh", "distributed_config", "fusion_config", "generation_config",
    "kernel_config", "key_mapping", "tp_plan", "tp_size",
)  # fmt: skip
ANSWERED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "cache_dir": ((None,), "set HF_HUB_CACHE, which huggingface_hub reads when it is imported"),
    "token": ((None, True), _LOGIN),
    "use_auth_token": ((None, True), _LOGIN),
    "local_files_only": ((None, False), "set HF_HUB_OFFLINE=1, or give the folder"),
    "force_download": ((None, False), "remove the model from the hub's cache, with `hf cache rm`"),
    "proxies": ((None,), "set HTTPS_PROXY"),
    "subfolder": ((None, ""), "give the folder that the model is in"),
    "variant": ((None,), "give a folder that holds that variant's files alone"),
    "config": ((None,), "the config.json beside the weights counts: change it there"),
    "state_dict": ((None,), "load the folder, then call load_state_dict"),
    "gguf_file": ((None,), f"GGUF is not read here; {_INSIDE}"),
    "from_tf": ((None, False), "weights of TensorFlow are not read"),
    "from_flax": ((None, False), "weights of Flax are not read; neoquant.jax runs quantized folders"),
    "weights_only": ((None, True), "pickles are read without running what they hold, always"),
    "load_in_4bit": ((None, False), 'quantization_config={"load_in_4bit": True} asks for it'),
    "load_in_8bit": ((None, False), 'quantization_config={"load_in_8bit": True} asks for it'),
    "output_loading_info": ((None, False), "`load_report` of the loaded model says it"),
    "ignore_mismatched_sizes": ((None, False), f"a head of another size is drawn anew by a fresh model; {_INSIDE}"),
    "label2id": ((None,), "it follows from id2label"),
    **dict.fromkeys(_THEIRS, ((None,), f"it is made for what only transformers does; {_INSIDE}")),
    "adapter_name": ((None, "default"), "neoquant.load_peft_model loads adapters"),
    "disable_mmap": ((None, False), "mmap=False copies weights into memory"),
}  # fmt: skip
"""Keyword -> values that ask for nothing, and how what the others ask for is done."""

_SETTINGS = {field.name for field in fields(GPTNeoConfig)} - {"extra"}


def require_nothing(others: Mapping[str, Any]) -> None:
    """Raise RequestError for a keyword that asks for what is not done here, or that there is not."""
    for name, value in others.items():
        if name in WITHOUT_EFFECT:
            continue
        if name in ANSWERED:
            neutral, answer = ANSWERED[name]
            if not any(value is each or (value == each and type(value) is type(each)) for each in neutral):
                raise RequestError(f"{name}={value!r:.60} is not done here: {answer}")
        elif name in _SETTINGS:
            raise RequestError(
                f"{name} is a setting of config.json: change it there, or in the loaded model's `config`"
            )
        else:
            raise RequestError(f"from_pretrained has no keyword {name!r}; those of transformers' own: {_INSIDE}")
