"""How a model is to be quantized while it is loaded, in transformers' words: the same classes, field by field.

Every field is either honoured or, where neoquant has no such thing, refused by name when it says anything but its
default: nothing is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch

from neoquant.errors import RequestError
from neoquant.model.names import HEADS, is_block_linear
from neoquant.quantization.recipe import Recipe

_ELSEWHERE = ("wikitext2", "c4", "c4-new", "ptb")  # names that transformers has for training text
COMPUTE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class BitsAndBytesConfig:
    """bitsandbytes' grids, rounded to the nearest.

    `load_in_8bit` is int8 rows; `load_in_4bit` the codebook `bnb_4bit_quant_type` ("fp4" or "nf4"), its scales
    quantized too with `bnb_4bit_use_double_quant`, multiplied in `bnb_4bit_compute_dtype` (float32), whatever the
    activations are. Linears that `llm_int8_skip_modules` names (a prefix, a regular expression from the beginning, or
    an end of their names) stay as they are; heads and embeddings do anyway.

    Raises RequestError for what contradicts itself or is not done here.
    """

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: list[str] | None = None
    llm_int8_enable_fp32_cpu_offload: bool = False
    llm_int8_has_fp16_weight: bool = False
    bnb_4bit_compute_dtype: torch.dtype | str | None = None
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_quant_storage: torch.dtype | str | None = None

    quant_method: ClassVar[str] = "bitsandbytes"
    refused: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "llm_int8_threshold": (6.0, "activations are not rounded here, so that none are outliers"),
        "llm_int8_enable_fp32_cpu_offload": (False, "quantized layers run on a CPU as they are"),
        "llm_int8_has_fp16_weight": (False, "quantized weights are held quantized"),
        "bnb_4bit_quant_storage": ("uint8", "packed weights are stored as bytes"),
    }

    def __post_init__(self) -> None:
        _require_bool(self, "load_in_8bit", "load_in_4bit", "bnb_4bit_use_double_quant")
        skipped = self.llm_int8_skip_modules
        if not isinstance(skipped, list | tuple | None) or not all(isinstance(name, str) for name in skipped or ()):
            raise RequestError(f"llm_int8_skip_modules is {skipped!r}; legal is a list of names")
        if self.load_in_4bit == self.load_in_8bit:
            found = "both" if self.load_in_4bit else "neither"
            raise RequestError(f"quantization_config says {found} of load_in_4bit and load_in_8bit: one is needed")
        if self.bnb_4bit_quant_type not in ("fp4", "nf4"):
            raise RequestError(f"bnb_4bit_quant_type is {self.bnb_4bit_quant_type!r}; legal are fp4 and nf4")
        for name in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"):  # as text, so that equal ones are equal
            value = getattr(self, name)
            default = "float32" if name.endswith("compute_dtype") else "uint8"
            object.__setattr__(self, name, default if value is None else str(value).removeprefix("torch."))
        if self.bnb_4bit_compute_dtype not in COMPUTE_DTYPES:
            raise RequestError(
                f"bnb_4bit_compute_dtype is {self.bnb_4bit_compute_dtype!r}; legal are {', '.join(COMPUTE_DTYPES)}"
            )
        _refuse(self)

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """What 4-bit weights are multiplied in; 8-bit ones are in the activations' own type."""
        return COMPUTE_DTYPES[str(self.bnb_4bit_compute_dtype)] if self.load_in_4bit else None

    def recipe(self, layers: Iterable[str]) -> Recipe:
        """The request for a checkpoint of these layers. Raises RequestError for a name that is none of theirs."""
        if self.load_in_8bit:
            recipe = Recipe.simple(8, "int8", format="bitsandbytes")
        else:
            double = self.bnb_4bit_use_double_quant
            recipe = Recipe.simple(4, self.bnb_4bit_quant_type, double_quant=double, format="bitsandbytes")
        kept: dict[str, None] = {}
        layers = list(layers)
        for pattern in self.llm_int8_skip_modules or ():
            found = [layer for layer in [*layers, *HEADS] if _names(pattern, layer)]
            if not found:
                raise RequestError(f"llm_int8_skip_modules names {pattern!r}, and no layer is called so")
            kept |= dict.fromkeys(layer for layer in found if is_block_linear(layer))  # others are kept anyway
        return recipe.keeping(kept, "llm_int8_skip_modules")

    def to_dict(self) -> dict[str, Any]:
        """As plain values, as transformers writes them."""
        return {"quant_method": self.quant_method, **{field.name: getattr(self, field.name) for field in fields(self)}}


@dataclass(frozen=True)
class GPTQConfig:
    """Affine groups, rounded with error feedback on text.

    `dataset` is a list of texts, a file of text, "pile", "demo" or a suite's name; rows of it are `model_seqlen` tokens
    long (the model's context, at most 2,048). `desc_act` orders inputs by their activations, in groups of their own;
    without it `act_group_aware` orders them and leaves groups where they are. `damp_percent` is added to the Hessian,
    of its mean diagonal. Of each block the linears in `modules_in_block_to_quantize` are quantized, or all.
    `tokenizer` is the model's unless another one is given, loaded or by name.

    Raises RequestError for what contradicts itself or is not done here.
    """

    bits: int
    tokenizer: Any = None
    dataset: list[str] | str | None = None
    group_size: int = 128
    damp_percent: float = 0.1
    desc_act: bool = False
    act_group_aware: bool = True
    sym: bool = True
    true_sequential: bool = True
    format: str | None = None
    meta: dict[str, Any] | None = None
    backend: str | None = None
    model_seqlen: int | None = None
    block_name_to_quantize: str | None = None
    module_name_preceding_first_block: list[str] | None = None
    batch_size: int = 1
    pad_token_id: int | None = None
    max_input_length: int | None = None
    cache_block_outputs: bool = True
    modules_in_block_to_quantize: list[list[str]] | None = None

    quant_method: ClassVar[str] = "gptq"
    compute_dtype: ClassVar[None] = None
    refused: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "true_sequential": (True, "layers are rounded one after another"),
        "meta": (None, "it says nothing about the rounding"),
        "backend": (None, "neoquant chooses among its own kernels"),
        "block_name_to_quantize": (None, "GPT-Neo's blocks are known"),
        "module_name_preceding_first_block": (None, "GPT-Neo's blocks are known"),
        "batch_size": (1, "rows are batched by the memory they take"),
        "pad_token_id": (None, "rows of text are not padded"),
        "max_input_length": (None, "there is no buffer of that length"),
        "cache_block_outputs": (True, "each block sees what the former one gives"),
    }

    def __post_init__(self) -> None:
        _refuse(self)
        _require_bool(self, "desc_act", "act_group_aware", "sym")
        stored = "gptq" if self.sym else "gptq_v2"
        if self.format not in (None, stored):
            raise RequestError(
                f"format is {self.format!r}; with sym={self.sym} legal is {stored!r}, which holds every zero exactly"
            )

    def recipe(self, layers: Iterable[str]) -> Recipe:
        """The request for a checkpoint of these layers. Raises RequestError for a grid or a layer that is none."""
        if self.dataset is None:
            legal = "a list of texts, a file of text, pile, demo or a suite's name"
            raise RequestError(f"GPTQ must see text, and dataset is None; legal is {legal}")
        if isinstance(self.dataset, str) and self.dataset in _ELSEWHERE:
            raise RequestError(f"dataset is {self.dataset!r}, whose training text neoquant does not fetch: pass texts")
        order = "dynamic" if self.desc_act else "static" if self.act_group_aware else "off"
        recipe = Recipe.simple(
            self.bits, "affine", group_size=self.group_size, symmetric=self.sym or None, quantizer="gptq",
            format="gptq", order=order, damping=float(self.damp_percent),
        )  # fmt: skip
        if self.modules_in_block_to_quantize is None:
            return recipe
        wanted = [name for together in self.modules_in_block_to_quantize for name in together]
        inside = [layer for layer in layers if re.search(r"\bh\.\d+\.", layer)]
        for name in wanted:
            if not any(layer.endswith(f".{name}") for layer in inside):
                raise RequestError(
                    f"modules_in_block_to_quantize names {name!r}, and no linear of a block is called so"
                )
        kept = [layer for layer in inside if not any(layer.endswith(f".{name}") for name in wanted)]
        return recipe.keeping(kept, "modules_in_block_to_quantize")

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {"quant_method": self.quant_method, **{field.name: getattr(self, field.name) for field in fields(self)}}


QuantizationConfig = BitsAndBytesConfig | GPTQConfig | Recipe
_METHODS: Mapping[str, type[BitsAndBytesConfig] | type[GPTQConfig]] = {
    cls.quant_method: cls for cls in (BitsAndBytesConfig, GPTQConfig)
}
_STORED_ONLY = ("compressed-tensors", "neoquant")  # methods of stored checkpoints that say nothing of how to quantize


def describes(given: Any, stored: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config=` is what the config.json of a quantized checkpoint says.

    It may be a dict, or one of the classes here or in transformers. What says how weights were chosen is not compared,
    but how they are stored.
    """
    if isinstance(given, Recipe) or not (isinstance(given, Mapping) or hasattr(given, "to_dict")):
        return False
    values = dict(given if isinstance(given, Mapping) else given.to_dict())
    method = _method(values)
    if method != _method(stored):
        return False
    if method == "bitsandbytes":
        names = ["load_in_4bit", "load_in_8bit"]
        names += ["bnb_4bit_quant_type", "bnb_4bit_use_double_quant"] if stored.get("load_in_4bit") else []
        return all(values.get(name, _BNB_DEFAULTS[name]) == stored.get(name, _BNB_DEFAULTS[name]) for name in names)
    if method == "gptq":
        return all(name in values and values[name] == stored.get(name) for name in ("bits", "group_size", "sym"))
    return all(stored.get(name) == value for name, value in values.items())


def _method(values: Mapping[str, Any]) -> str | None:
    """The `quant_method`, which old checkpoints and plain dicts of bitsandbytes leave out."""
    method = values.get("quant_method")
    method = getattr(method, "value", method)  # transformers' is an enumeration
    if method is None and (values.get("load_in_4bit") or values.get("load_in_8bit")):
        return BitsAndBytesConfig.quant_method
    return method


_BNB_DEFAULTS: Mapping[str, Any] = {field.name: field.default for field in fields(BitsAndBytesConfig)}


def read_config(said: Any) -> QuantizationConfig:
    """What `quantization_config=` asks for: our own classes, transformers' of the same names, plain values or a Recipe,
    which may be named.

    Raises RequestError for another method, or a field that is not known.
    """
    if isinstance(said, BitsAndBytesConfig | GPTQConfig | Recipe):
        return said
    if isinstance(said, str | Path):
        return Recipe.load(said)
    if not isinstance(said, Mapping) and not hasattr(said, "to_dict"):
        legal = "a BitsAndBytesConfig, a GPTQConfig, a Recipe or its name, or a dict"
        raise RequestError(f"quantization_config is of type {type(said).__name__}; legal is {legal}")
    values = dict(said if isinstance(said, Mapping) else said.to_dict())
    method = _method(values)
    values.pop("quant_method", None)
    if method in _STORED_ONLY:
        raise RequestError(
            f"quantization_config says quant_method {method!r}, which describes stored weights: to quantize a plain "
            "checkpoint, give a BitsAndBytesConfig, a GPTQConfig or a Recipe"
        )
    if method is None or method not in _METHODS:
        raise RequestError(f"quantization_config says quant_method {method!r}; legal are {', '.join(_METHODS)}")
    cls = _METHODS[method]
    if cls is GPTQConfig:
        values = _as_ours(values)
    known = [field.name for field in fields(cls)]
    unknown = [name for name in values if name not in known and not name.startswith("_")]
    if unknown:
        raise RequestError(f"quantization_config has no field {unknown[0]!r}; it has {', '.join(known)}")
    return cls(**{name: value for name, value in values.items() if name in known})


# What config.json of a GPTQ checkpoint states beside, where it says nothing unusual.
_GPTQ_STORED: Mapping[str, Any] = {"lm_head": False, "pack_dtype": "int32", "static_groups": False}


def _as_ours(values: dict[str, Any]) -> dict[str, Any]:
    """transformers' GPTQConfig writes its defaults out, some of them under two names; config.json has more of them."""
    values = {name: value for name, value in values.items() if _GPTQ_STORED.get(name, ...) != value}
    version = values.pop("checkpoint_format", None)
    stated = values.pop("format", None) or version
    if stated == "gptq" and not values.get("sym", True):
        stated = None  # its default, which it cannot tell from a wish; what is stored holds the same weights
    backend = values.pop("backend", None)
    return {**values, "format": stated, "backend": None if backend == "auto" else backend}


def _refuse(config: BitsAndBytesConfig | GPTQConfig) -> None:
    for name, (default, why) in config.refused.items():
        if getattr(config, name) != default:
            raise RequestError(f"{name} is {getattr(config, name)!r}; legal is {default!r} only: {why}")


def _require_bool(config: BitsAndBytesConfig | GPTQConfig, *names: str) -> None:
    """Raise RequestError for a field that says something else than yes or no: the text "false" would count as yes."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, bool):
            raise RequestError(f"{name} is {value!r}; legal are True and False")


def _names(pattern: str, layer: str) -> bool:
    """Whether a name of `llm_int8_skip_modules` means this layer, by transformers' rules."""
    ends = r"(?:(?<=\.)|(?=\.|$))"
    bare = layer.removeprefix("transformer.")
    try:
        return layer.endswith(pattern) or any(re.match(rf"(?:{pattern}){ends}", name) for name in (layer, bare))
    except re.error as error:
        raise RequestError(f"llm_int8_skip_modules holds {pattern!r}, no regular expression: {error}") from None
