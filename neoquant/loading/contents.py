"""What a checkpoint holds, by the names that a model has for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from neoquant.checkpoint import TensorHeader
from neoquant.checkpoint.headers import float_type
from neoquant.formats import Format
from neoquant.loading.device_map import unit_of
from neoquant.model.base import Network
from neoquant.model.names import BASE_PREFIX


class Readable(Protocol):
    """What a model is made from: a checkpoint, or what reads like one."""

    @property
    def source(self) -> str: ...
    @property
    def folder(self) -> Path | None: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def headers(self) -> Mapping[str, TensorHeader]: ...
    @property
    def dropped(self) -> tuple[str, ...]: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    def view(self, name: str) -> Tensor: ...
    def forget(self, name: str) -> None: ...
    def require_unchanged(self) -> None: ...


@dataclass(frozen=True)
class Contents:
    """A checkpoint's tensors as a model calls them.

    plain     tensor of the model -> its name in the checkpoint
    layers    quantized layer of the model -> its name in the checkpoint
    suffixes  quantized layer of the checkpoint -> what follows its name in those of its tensors
    headers   of all tensors of the checkpoint
    """

    plain: Mapping[str, str]
    layers: Mapping[str, str]
    suffixes: Mapping[str, list[str]]
    headers: Mapping[str, TensorHeader]

    @classmethod
    def of(cls, checkpoint: Readable, model: Network, format: Format | None) -> Contents:
        """The contents of `checkpoint`, whose quantized layers are in `format`."""
        headers = checkpoint.headers
        suffixes = format.quantized(headers) if format else {}
        packed = _packed(suffixes)
        renamed = _Renaming(headers, model)
        return cls(
            plain={renamed(name): name for name in headers if name not in packed},
            layers={renamed(layer): layer for layer in suffixes},
            suffixes=suffixes,
            headers=headers,
        )

    @property
    def tensors(self) -> set[str]:
        """The tensors of the model that the checkpoint has, quantized or plain."""
        return {*self.plain, *(f"{layer}.weight" for layer in self.layers)}

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of the weights that are not quantized; None where there are none."""
        return float_type(self.headers[name] for name in self.plain.values())

    def unit_sizes(self, model: Network, dtype: torch.dtype) -> dict[str, int]:
        """Bytes of each unit of the model, in the order of computing: quantized as stored, others in `dtype`."""
        tied = bool(model.tied_weights())
        sizes = dict.fromkeys((unit_of(name, tied) for name in dict(model.named_parameters(remove_duplicate=False))), 0)
        for name, stored in self.plain.items():
            if (unit := unit_of(name, tied)) in sizes:
                sizes[unit] += self.headers[stored].numel * dtype.itemsize
        for layer, stored in self.layers.items():
            if (unit := unit_of(f"{layer}.weight", tied)) in sizes:
                sizes[unit] += sum(self.headers[stored + suffix].nbytes for suffix in self.suffixes[stored])
        return sizes


class _Renaming:
    """Gives stored names as a model has them: a bare GPTNeoModel's tensors have no `transformer.` before them."""

    def __init__(self, names: Iterable[str], model: Network) -> None:
        self.stored_base = any(name.startswith(BASE_PREFIX) for name in names)
        self.wanted_base = bool(model.base_model_prefix)

    def __call__(self, name: str) -> str:
        if self.stored_base and not self.wanted_base:
            return name.removeprefix(BASE_PREFIX)
        return BASE_PREFIX + name if self.wanted_base and not self.stored_base else name


def _packed(suffixes: Mapping[str, Iterable[str]]) -> set[str]:
    """The tensors that quantized layers are made of."""
    return {layer + suffix for layer, inside in suffixes.items() for suffix in inside}
