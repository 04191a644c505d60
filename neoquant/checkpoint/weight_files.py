"""Which files of a model folder hold its weights, and which travel with them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from neoquant.errors import CheckpointError
from neoquant.sizes import plural

CONFIG, GPTQ_CONFIG = "config.json", "quantize_config.json"
"""What describes a model; and where AutoGPTQ wrote how it is quantized, before that stood in the former."""

# In order of preference.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# Files that travel with the weights, whatever happens to them.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer*.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
)

_INDEX = ".index.json"
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_OF_TRAINING = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "adapter_model", "random_states")
_OF_OTHER_PROGRAMS = ("qmodel.pt",)  # hqq's, of which a folder is told by name
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(\.\w+)")


class WeightFiles(NamedTuple):
    """The files that hold a model's tensors: those that `index_file` names, or `files`. `note` says what is unusual."""

    index_file: str | None
    files: tuple[str, ...]
    note: str | None = None


def choose_weight_files(names: Iterable[str]) -> WeightFiles | None:
    """The files to read among the `names` of a model folder; None where none of them holds weights.

    Preferred are transformers' names. Else the only file of weights is taken whatever it is called, AutoGPTQ's
    `gptq_model-4bit-128g.safetensors` for one; or the shards of one file, all of them being there.

    Raises CheckpointError where several may be meant.
    """
    names = sorted(name for name in names if name not in _OF_OTHER_PROGRAMS)
    for name in WEIGHT_FILES:
        if name in names:
            return _with_index(name, names) if name.endswith(_INDEX) else WeightFiles(None, (name,))
    for suffix in _SUFFIXES:
        if found := _only(suffix, names):
            return found
    return None


def is_companion(name: str) -> bool:
    """Whether a file of this name travels with the weights: tokenizer, generation settings, license."""
    return any(fnmatchcase(name, pattern) for pattern in COMPANIONS)


def is_written(name: str) -> bool:
    """Whether a file of this name is one of those that saving a model writes: config.json, weights, their index."""
    if name in (CONFIG, *WEIGHT_FILES[:2]):
        return True
    shard = _SHARD.fullmatch(name)
    return shard is not None and (shard[1], shard[4]) == ("model", ".safetensors")


def may_be_weights(name: str) -> bool:
    """Whether a reader might take a file of this name for a model's weights, or for their index."""
    stored = name.removesuffix(_INDEX).endswith((".safetensors", ".bin"))
    return stored and not name.startswith(_OF_TRAINING)


def _with_index(index: str, names: list[str], note: str | None = None) -> WeightFiles:
    stem, _, suffix = index.removesuffix(_INDEX).rpartition(".")
    shards = (name for name in names if fnmatchcase(name, f"{stem}-*-of-*.{suffix}"))
    return WeightFiles(index, tuple(shards), note)


def _only(suffix: str, names: list[str]) -> WeightFiles | None:
    """The only weights of one kind, by whatever name."""
    indices = [name for name in names if name.endswith(suffix + _INDEX)]
    if len(indices) == 1:
        return _with_index(indices[0], names, f"weights are read from the files that {indices[0]} names")
    files = [name for name in names if name.endswith(suffix) and not name.startswith(_OF_TRAINING)]
    if not files:
        return None
    if len(files) == 1 and not _SHARD.fullmatch(files[0]):
        return WeightFiles(None, tuple(files), f"weights are read from {files[0]}, the only file of weights there")
    parts = [found for name in files if (found := _SHARD.fullmatch(name))]
    if len(parts) == len(files) and len({(part[1], part[3]) for part in parts}) == 1:
        stem, count = parts[0][1], int(parts[0][3])
        if [int(part[2]) for part in parts] == list(range(1, count + 1)):
            return WeightFiles(
                None, tuple(files), f"no index names the {plural(count, 'shard')} of {stem}{suffix}; all are read"
            )
        raise CheckpointError(
            f"holds {len(files)} of {count} shards of {stem}{suffix}, and no index; download the others as well"
        )
    shown = ", ".join(files[:5]) + (", ..." if len(files) > 5 else "")
    raise CheckpointError(f"holds several files of weights: {shown}; call the one to read model{suffix}")
