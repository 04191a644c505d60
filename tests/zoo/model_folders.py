"""Model folders as people have them: config spellings, heads, ties, files, types and quantization, all tiny."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 3,
    "max_position_embeddings": 32,
    "initializer_range": 0.4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


@cache
def original(head: str = "CausalLM", **config: Any) -> tuple[dict[str, Any], Tensors]:
    """The config and the tensors that transformers saves of a random model of its own."""
    import tempfile

    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, f"GPTNeoFor{head}" if head else "GPTNeoModel")(
        transformers.GPTNeoConfig(**{**SIZES, **config})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # norms and biases that are not at their beginnings
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return json.loads((Path(folder) / "config.json").read_text()), load_file(f"{folder}/model.safetensors")


@dataclass(frozen=True)
class Model:
    """One way to store a model.

    Attributes:
        head: the class behind "GPTNeoFor"; "" for GPTNeoModel.
        made: changes to the config of the model that is drawn.
        config: changes to config.json; None removes a key.
        edit: what happens to the tensors, names included.
        write: stores the tensors in a folder.
        files: other JSON files.
        error: what neoquant says where it refuses the folder.
    """

    head: str = "CausalLM"
    made: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    edit: Callable[[Tensors], Tensors] = dict
    write: Callable[[Path, Tensors], None] = lambda folder, tensors: safetensors(folder, tensors)
    files: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def make(self, folder: Path) -> Path:
        """Write it."""
        config, tensors = original(self.head, **{name: _hashable(value) for name, value in self.made.items()})
        folder.mkdir(parents=True)
        changed = {**config, **self.config}
        (folder / "config.json").write_text(json.dumps({n: v for n, v in changed.items() if v is not None}))
        self.write(folder, self.edit({name: tensor.clone() for name, tensor in tensors.items()}))
        for name, value in self.files.items():
            (folder / name).write_text(json.dumps(value))
        return folder


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def safetensors(folder: Path, tensors: Tensors) -> None:
    """One file."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def binary(folder: Path, tensors: Tensors) -> None:
    """One pickled file, in the order of `tensors`."""
    torch.save(tensors, folder / "pytorch_model.bin")


def sharded(suffix: str, name: str) -> Callable[[Path, Tensors], None]:
    """Three shards and their index."""

    def write(folder: Path, tensors: Tensors) -> None:
        shards = [f"{name}-{number:05}-of-00003.{suffix}" for number in (1, 2, 3)]
        where = {tensor: shards[number % 3] for number, tensor in enumerate(tensors)}
        for shard in shards:
            part = {tensor: tensors[tensor] for tensor, place in where.items() if place == shard}
            if suffix == "safetensors":
                save_file(part, folder / shard, metadata={"format": "pt"})
            else:
                torch.save(part, folder / shard)
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
        (folder / f"{name}.{suffix}.index.json").write_text(json.dumps(index))

    return write


def to(dtype: torch.dtype, *names: str) -> Callable[[Tensors], Tensors]:
    """All tensors, or those whose names hold one of `names`, in another type."""
    return lambda tensors: {
        name: tensor.to(dtype) if not names or any(part in name for part in names) else tensor
        for name, tensor in tensors.items()
    }


def _with_head(same: bool) -> Callable[[Tensors], Tensors]:
    def edit(tensors: Tensors) -> Tensors:
        head = tensors["transformer.wte.weight"].clone()
        return {**tensors, "lm_head.weight": head if same else head.flip(0)}

    return edit


def _head_first(tensors: Tensors) -> Tensors:
    return {"lm_head.weight": tensors["transformer.wte.weight"], **tensors}


def _only_head(tensors: Tensors) -> Tensors:
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    return tensors


def _buffers(tensors: Tensors) -> Tensors:
    """The causal masks that transformers before 4.30 saved."""
    for index in range(2):
        mask = torch.ones(32, 32, dtype=torch.bool).tril()[None, None]
        tensors[f"transformer.h.{index}.attn.attention.bias"] = mask
        tensors[f"transformer.h.{index}.attn.attention.masked_bias"] = torch.tensor(-1e9)
    return tensors


def _prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def _bare(tensors: Tensors) -> Tensors:
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def _without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def models() -> dict[str, Model]:
    """name -> how it is stored."""
    untied = {"tie_word_embeddings": False}
    labels = {"num_labels": 3}
    half = {"edit": to(torch.float16), "config": {"dtype": "float16"}}
    return {
        "as transformers saves it": Model(),
        # config.json
        "attention_layers beside attention_types": Model(config={"attention_layers": ["global", "local"]}),
        "attention_layers alone": Model(config={"attention_types": None, "attention_layers": ["global", "local"]}),
        "all global": Model(made={"attention_types": [[["global"], 2]]}),
        "two groups": Model(made={"attention_types": [[["global", "local"], 1], [["local"], 1]], "num_layers": 3}),
        "one layer": Model(made={"attention_types": [[["local"], 1]], "num_layers": 1}),
        "intermediate_size": Model(made={"intermediate_size": 20}),
        "relu": Model(made={"activation_function": "relu"}),
        "gelu": Model(made={"activation_function": "gelu"}),
        "layer_norm_epsilon": Model(made={"layer_norm_epsilon": 0.1}),
        "torch_dtype": Model(config={"dtype": None, "torch_dtype": "float16"}, edit=to(torch.float16)),
        "no type": Model(config={"dtype": None}),
        "several ends of text": Model(config={"eos_token_id": [0, 7, 12]}),
        "no end of text": Model(config={"eos_token_id": None, "pad_token_id": None}),
        "unknown keys": Model(config={"my_own": [1], "gradient_checkpointing": False, "summary_type": "cls_index"}),
        "dropout": Model(config={"resid_dropout": 0.3, "embed_dropout": 0.1, "attention_dropout": 0.2}),
        # Heads and ties
        "untied": Model(made=untied),
        "untied in one file of each": Model(made=untied, write=sharded("safetensors", "model")),
        "tied, the head is there too": Model(edit=_with_head(same=True)),
        "tied, another head": Model(edit=_with_head(same=False)),
        "silent about the tie, another head": Model(edit=_with_head(same=False), config={"tie_word_embeddings": None}),
        "only the head": Model(edit=_only_head),
        "untied by the config, no head": Model(
            config=untied, error=r"lacks .*lm_head\.weight|lm_head\.weight is missing|no tensor .*lm_head"
        ),
        "no head": Model(head=""),
        "sequence classification": Model(head="SequenceClassification", made=labels),
        "token classification": Model(head="TokenClassification", made=labels),
        "question answering": Model(head="QuestionAnswering"),
        # Files
        "bin": Model(write=binary),
        "bin, the head before the embedding": Model(edit=_head_first, write=binary),
        "bin, half precision": Model(write=binary, **half),
        "safetensors shards": Model(write=sharded("safetensors", "model")),
        "bin shards": Model(write=sharded("bin", "pytorch_model")),
        "masks of old versions": Model(edit=_buffers, write=binary),
        "names without their prefix": Model(edit=_bare),
        "names of the bare model in shards": Model(edit=_bare, write=sharded("bin", "pytorch_model")),
        # Types
        "float16": Model(**half),
        "bfloat16": Model(edit=to(torch.bfloat16), config={"dtype": "bfloat16"}),
        "float64": Model(
            edit=to(torch.float64), config={"dtype": "float64"}, error=r"that is float64.*legal are auto, float32"
        ),
        "float16 without a type in the config": Model(edit=to(torch.float16), config={"dtype": None}),
        "float16 called float32": Model(edit=to(torch.float16), config={"dtype": "float32"}),
        "norms in float32": Model(edit=to(torch.float16, "attn", "mlp", "wte", "wpe"), config={"dtype": "float16"}),
        # Generation
        "generation_config.json ends elsewhere": Model(files={"generation_config.json": {"eos_token_id": [7, 33]}}),
        "generation_config.json with a penalty": Model(
            files={"generation_config.json": {"eos_token_id": 0, "repetition_penalty": 1.7, "max_new_tokens": 5}}
        ),
        "a penalty in config.json": Model(config={"repetition_penalty": 1.7}),
        "max_length in config.json": Model(config={"max_length": 15}),
        "no_repeat_ngram_size in config.json": Model(config={"no_repeat_ngram_size": 1}),
        "use_cache false": Model(config={"use_cache": False}),
        "use_cache true": Model(config={"use_cache": True}),
        "output_hidden_states": Model(config={"output_hidden_states": True}),
        # Wrappers' names: transformers finds no tensor, and draws the model at random.
        "module. in front": Model(edit=_prefixed("module."), error="only neoquant"),
        "_orig_mod. in front": Model(edit=_prefixed("_orig_mod."), error="only neoquant"),
        "a tensor is missing": Model(edit=_without("transformer.ln_f.bias"), error=r"transformer\.ln_f\.bias"),
        "a tensor of another shape": Model(
            edit=lambda t: {**t, "transformer.ln_f.bias": torch.zeros(7)}, error=r"ln_f\.bias.*7"
        ),
    }


QUANTIZED: dict[str, dict[str, Any]] = {
    "nf4": {"bits": 4, "type": "nf4"},
    "fp4 in blocks of 32": {"type": "fp4", "block_size": 32, "double_quant": False},
    "int8": {"bits": 8, "type": "int8"},
    "some kept": {"type": "nf4", "keep": ["*.mlp.c_proj"]},
}

_WIDE = {"hidden_size": 64, "num_heads": 4}
WHOLE_BLOCKS = {
    "float32": Model(made=_WIDE),
    "float16": Model(made=_WIDE, edit=to(torch.float16), config={"dtype": "float16"}),
}
