"""What a format is."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from neoquant.errors import FormatError
from neoquant.grids import Grid
from neoquant.tensor import QuantizedTensor

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # suffix -> what is stored under layer + suffix


class Format(ABC):
    """Spells a quantized weight as tensors in a file, and reads it back, without rounding.

    Knows local names only: a linear layer X is stored as tensors X + suffix, for example `X.weight` and
    `X.weight.absmax`. A bias is not the format's: it stays `X.bias`, in its own type.
    """

    name: ClassVar[str]
    family: ClassVar[str]  # what a recipe says: "bitsandbytes", "gptq", "compressed-tensors" or "neoquant"
    markers: ClassVar[tuple[str, ...]]  # a layer X is quantized if a tensor X + one of these exists
    stems: ClassVar[tuple[str, ...]] = (".weight",)  # what all suffixes of a layer begin with
    other_methods: ClassVar[tuple[str, ...]] = ()  # quant_methods with the same markers that pack weights otherwise
    holds_order: ClassVar[bool] = False  # whether an activation order can be stored
    holds_dtype: ClassVar[bool] = False  # whether a layer says what type its weight was before
    holds_embeddings: ClassVar[bool] = False  # whether who reads it can look rows up in a quantized weight

    compute_key: ClassVar[str | None] = None  # of config.json: in which type weights are multiplied

    @property
    def label(self) -> str:
        """What users read: the family's name, with the format's own where that says more."""
        return f"{self.family} ({self.name})" if self.family == "bitsandbytes" else self.family

    def configured(self, said: Mapping[str, Any]) -> Format:
        """The format as a checkpoint of this `quantization_config` has it, where its tensors do not say all."""
        return self

    def checked(
        self, layers: Mapping[str, Iterable[str]], view: Callable[[str], Tensor]
    ) -> tuple[Format, tuple[str, ...]]:
        """The format as the checkpoint's tensors have it, where config.json contradicts them; and notes that say so.

        `layers` is layer -> suffixes of its tensors, as `quantized` gives it; `view` gives a tensor by its name.
        Raises FormatError where the tensors contradict each other.
        """
        return self, ()

    @abstractmethod
    def refuse(self, grid: Grid, shape: tuple[int, ...]) -> str | None:
        """Why a weight [O, I] on `grid` cannot be stored, or None."""

    def refuse_all(self, grids: Mapping[str, Grid]) -> str | None:
        """Why one checkpoint cannot hold these layers together, or None."""
        return None

    def refuse_order(self) -> str | None:
        """Why a weight with an activation order cannot be stored, or None."""
        return None if self.holds_order else f"format {self.name} cannot hold an activation order"

    def refuse_tensor(self, q: QuantizedTensor) -> str | None:
        """Why this weight, with the values that it has, cannot be stored exactly, or None."""
        return self.refuse(q.grid, q.shape) or (None if q.order is None else self.refuse_order())

    def caution(self, grid: Grid, shape: tuple[int, ...]) -> str | None:
        """What a user should know about other readers of this weight, or None."""
        return None

    @abstractmethod
    def encode(self, q: QuantizedTensor) -> dict[str, Tensor]:
        """Suffix -> tensor. Raises FormatError for what the format cannot hold."""

    @abstractmethod
    def decode(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float16
    ) -> QuantizedTensor:
        """The inverse of `encode`, bit for bit.

        `shape` is what the model expects (None: anything), `dtype` the weight's type where the format does not
        store it. Raises FormatError for tensors that do not spell a weight of that shape.
        """

    @abstractmethod
    def layout(
        self, grid: Grid, shape: tuple[int, ...], dtype: torch.dtype = torch.float16, ordered: bool = False
    ) -> Layout:
        """What `encode` will give for a weight [O, I], without one; JSON may turn out a few bytes shorter.

        `ordered` says that it has an activation order.
        """

    @abstractmethod
    def config(self, grids: Mapping[str, Grid], kept: Iterable[str], ordered: bool = False) -> dict[str, Any]:
        """The `quantization_config` of config.json: layer name -> grid, and the linear layers that are kept.

        `ordered` says that some layer has an activation order.
        """

    def compute_dtype(self, said: Mapping[str, Any]) -> torch.dtype | None:
        """In which type a checkpoint of this `quantization_config` is multiplied; None is the activations' own.

        Raises FormatError for what is no such type.
        """
        name = said.get(self.compute_key) if self.compute_key else None
        return None if name is None else dtype_from_name(str(name).removeprefix("torch."))

    def quantized(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Layer -> suffixes of its stored tensors, for the quantized layers among a checkpoint's tensor names.

        What else stands inside a layer (its bias, an adapter, another program's scale) is none of the format's.
        """
        names = list(names)
        layers: dict[str, list[str]] = {}
        for name in names:
            for marker in self.markers:
                if name.endswith(marker):
                    layers[name.removesuffix(marker)] = []
        for name in names:
            layer = name
            while layer not in layers and "." in layer:
                layer = layer.rpartition(".")[0]
            if layer in layers and (suffix := name.removeprefix(layer)).startswith(self.stems):
                layers[layer].append(suffix)
        return layers

    def _require_holdable(self, q: QuantizedTensor) -> None:
        if reason := self.refuse_tensor(q):
            raise FormatError(reason)


def require_suffixes(tensors: Mapping[str, Tensor], required: Iterable[str]) -> None:
    """Raise FormatError unless `tensors` has exactly the suffixes `required`."""
    required = set(required)
    if missing := required - tensors.keys():
        raise FormatError(f"the quantized weight lacks {_list(missing)}; it is {_list(required)}")
    if unknown := tensors.keys() - required:
        raise FormatError(f"the quantized weight has unknown {_list(unknown)}; it is {_list(required)}")


def require_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise FormatError unless `tensor` has this type and shape."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise FormatError(f"{name} is {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")


def require_shape(found: tuple[int, ...], expected: tuple[int, ...] | None) -> None:
    """Raise FormatError unless the stored shape is what the model expects."""
    if expected is not None and found != tuple(expected):
        raise FormatError(f"the stored weight is {list(found)}, the model's is {list(expected)}")


def json_to_tensor(value: dict[str, Any]) -> Tensor:
    """A JSON object as its UTF-8 bytes, uint8[n]: how safetensors files carry what is not a tensor."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def json_from_tensor(name: str, tensor: Tensor) -> dict[str, Any]:
    """The inverse of `json_to_tensor`. Raises FormatError where the bytes are not a JSON object."""
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise FormatError(f"{name} holds JSON as uint8 [n], got {tensor.dtype} {list(tensor.shape)}")
    try:
        value = json.loads(bytes(tensor.tolist()))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{name} holds a JSON {type(value).__name__}, not an object")
    return value


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float16` -> "float16"."""
    return str(dtype).removeprefix("torch.")


def dtype_from_name(name: object) -> torch.dtype:
    """The inverse, for the types a weight can have. Raises FormatError for others."""
    found = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}.get(str(name))
    if found is None:
        raise FormatError(f"the weight's type is {name!r}; legal are float32, float16 and bfloat16")
    return found


def shape_from_json(value: object) -> tuple[int, int]:
    """[O, I] of a header. Raises FormatError for anything else."""
    match value:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    raise FormatError(f"the weight's shape is two positive numbers, got {value!r}")


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(name.removeprefix(".") for name in names))
