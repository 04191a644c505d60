"""From the names that a file has for its tensors to GPT-Neo's own: the one place that knows what wraps models.

Training code wraps a model in modules that put a word into every name; transformers' loaders want it gone. And a head
that is tied to the token embedding may be stored under either name, or under both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from neoquant.checkpoint.stored import Stored
from neoquant.errors import CheckpointError
from neoquant.model.names import BASE_PREFIX, EMBEDDING, HEADS, TIED_HEAD, is_mask_buffer

# Words that begin every name, and those that may stand anywhere in one: who puts them there.
_PREFIXES: Mapping[str, str] = {
    "module.": "DataParallel, DistributedDataParallel or DeepSpeed",
    "_forward_module.": "Lightning",
    "model.": "Lightning, or another module around the model",
    "base_model.model.": "PEFT",
}
_PARTS: Mapping[str, str] = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
_ADAPTED = "base_layer"  # where PEFT puts a layer that it gives an adapter
_ROOTS = (BASE_PREFIX.rstrip("."), "wte", "wpe", "h", "ln_f", *HEADS)  # what the network's own names begin with

_TWICE = (f"{BASE_PREFIX}{BASE_PREFIX}", *(f"{BASE_PREFIX}{head}." for head in HEADS))
_OWN_EMBEDDING = EMBEDDING.removeprefix(BASE_PREFIX)


class Normalized(NamedTuple):
    """A checkpoint's tensors by GPT-Neo's names.

    dropped  names left out: mask buffers of old checkpoints, and a tied head that is the embedding's own bytes
    notes    what was done about names, a line each
    """

    kept: dict[str, Stored]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]


def normalize(stored: Iterable[Stored], config: Mapping[str, Any]) -> Normalized:
    """Give tensors GPT-Neo's names and leave out what is none of its weights.

    Raises CheckpointError where two tensors would have one name, or a layer has an adapter that is not merged.
    """
    entries = list(stored)
    names, notes = _unwrapped([entry.header.name for entry in entries])
    by_name: dict[str, Stored] = {}
    if adapter := next((name for name in names if _ADAPTED in name.split(".")), None):
        raise CheckpointError(
            f"tensor {adapter!r} has an adapter beside it (PEFT): save the model again after merge_and_unload()"
        )
    for name, entry in zip(names, entries, strict=True):
        if name in by_name:
            raise CheckpointError(f"tensor {entry.header.name!r} and another one are both {name!r} once unwrapped")
        by_name[name] = entry
    dropped = [name for name in by_name if is_mask_buffer(name)]
    if ties_head(config):
        by_name, second_names = _without_second_names(by_name)
        dropped += second_names
    left_out = set(dropped)
    kept = {
        name: entry._replace(header=entry.header._replace(name=name))
        for name, entry in by_name.items()
        if name not in left_out
    }
    return Normalized(kept, tuple(dropped), tuple(notes))


def ties_head(config: Mapping[str, Any]) -> bool:
    """Whether config.json ties the language model's head to the token embedding, as it does where it is silent."""
    stated = config.get("tie_word_embeddings")
    return True if stated is None else bool(stated)


def head_and_embedding(names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The tensors of the language model's head and of the token embedding: suffix -> name.

    A layer may be one tensor, or, where it is quantized, several.
    """
    names = list(names)
    bare_names = [name.removeprefix(BASE_PREFIX) for name in names]

    def tensors(layer: str) -> dict[str, str]:
        found = [(bare, name) for bare, name in zip(bare_names, names, strict=True) if bare.startswith(f"{layer}.")]
        return {bare.removeprefix(layer): name for bare, name in found if bare != f"{layer}.bias"}

    return tensors("lm_head"), tensors("wte")


def _unwrapped(names: list[str]) -> tuple[list[str], list[str]]:
    """The names without the words that wrappers put there, and a note for each such word."""
    notes = []
    for part, wrapper in _PARTS.items():
        if any(part in name.split(".") for name in names):
            names = [".".join(word for word in name.split(".") if word != part) for name in names]
            notes.append(f"{part} is left out of the tensors' names; {wrapper} puts it there")
    while prefix := _common_prefix(names):
        names = [name.removeprefix(prefix) for name in names]
        wrapper = _PREFIXES.get(prefix, "a module around the model")
        notes.append(f"{prefix} is left out of the tensors' names; {wrapper} puts it there")
    if prefix := _prefix_of_the_network(names):
        names = [name.removeprefix(prefix) for name in names]
        notes.append(f"{prefix} is left out of the tensors' names that begin with it, a module around the model's")
    return names, notes


def _common_prefix(names: Sequence[str]) -> str:
    """What a wrapper puts in front of all names: a known word, or what stands before the network's own; or nothing."""
    if not names:
        return ""
    if all(name.startswith(_TWICE) for name in names):
        return BASE_PREFIX  # of a wrapper that calls the whole model as it calls its network
    words = names[0].split(".")
    before = next((place for place, word in enumerate(words) if word in _ROOTS), 0)
    for prefix in (*_PREFIXES, "".join(f"{word}." for word in words[:before])):
        if prefix and all(name.startswith(prefix) for name in names):
            return prefix
    return ""


def _prefix_of_the_network(names: Sequence[str]) -> str:
    """What stands before the network's names alone, beside other tensors (a value head's, for one); or nothing.

    Raises CheckpointError where several networks are there.
    """
    if any(name.split(".", 1)[0] in _ROOTS for name in names):
        return ""
    embeddings = [name for name in names if f".{name}".endswith(f".{_OWN_EMBEDDING}")]
    prefixes = [name.removesuffix(_OWN_EMBEDDING).removesuffix(BASE_PREFIX) for name in embeddings]
    if len(prefixes) > 1:
        raise CheckpointError(f"holds several networks, {' and '.join(prefixes)}: save the one that is meant alone")
    return prefixes[0] if prefixes else ""


def _without_second_names(stored: dict[str, Stored]) -> tuple[dict[str, Stored], list[str]]:
    """A tied head under the embedding's name, if it has only its own; and names of one tensor that has both."""
    head, embedding = head_and_embedding(stored)
    if head and not embedding:
        inside = BASE_PREFIX if any(name.startswith(BASE_PREFIX) for name in stored) else ""
        renamed = {name: f"{inside}wte{suffix}" for suffix, name in head.items()}
        return {renamed.get(name, name): entry for name, entry in stored.items()}, []
    first, second = stored.get(EMBEDDING), stored.get(TIED_HEAD)
    if first and second and first.header.numel and first.identity == second.identity:
        return stored, [TIED_HEAD]
    return stored, []
