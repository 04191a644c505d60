"""Putting a checkpoint's tensors into an empty model, one at a time, each where it belongs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from neoquant import formats
from neoquant.checkpoint import TensorHeader
from neoquant.errors import CheckpointError, RequestError, locate
from neoquant.formats import Format
from neoquant.formats.base import dtype_name
from neoquant.loading.device_map import DeviceMap, unit_of
from neoquant.model.base import LoadReport, Network
from neoquant.model.dtypes import resolve_dtype
from neoquant.model.names import BASE_PREFIX
from neoquant.nn.linear import QuantEmbedding, QuantLinear, StoredEmbedding, StoredLinear, is_native
from neoquant.progress import Progress


class LoadWarning(UserWarning):
    """A checkpoint and a model class do not hold the same tensors, in a way that can be lived with."""


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


class NoInit(TorchFunctionMode):
    """Skips the initialization of fresh weights: on the meta device, drawing none takes torch seconds of imports."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


class Filler:
    """Puts a checkpoint's tensors into an empty model, one at a time."""

    def __init__(
        self,
        checkpoint: Readable,
        model: Network,
        format: Format | None,
        dtype: torch.dtype,
        places: DeviceMap,
        compute_dtype: torch.dtype | None,
    ) -> None:
        self.checkpoint, self.model, self.format = checkpoint, model, format
        self.dtype, self.places, self.compute_dtype = dtype, places, compute_dtype
        self.layers = format.quantized(checkpoint.headers) if format else {}
        spelled = {layer + suffix for layer, suffixes in self.layers.items() for suffix in suffixes}
        self.plain = [name for name in checkpoint.headers if name not in spelled]

    def run(self, progress: Progress) -> None:
        stored_base = _has_base_prefix(self.checkpoint.headers)
        slots = dict(self.model.named_parameters(remove_duplicate=False))
        tied = self.model.tied_weights()
        plain = {self._here(name, stored_base): name for name in self.plain}
        layers = {self._here(name, stored_base): name for name in self.layers}
        available = plain.keys() | {f"{layer}.weight" for layer in layers}
        missing = [name for name in slots if name not in available and name not in tied]
        unexpected = [name for name in available if name not in slots]
        self._refuse_missing(missing)
        with progress.task("loading", total=len(slots)) as advance:
            for name, parameter in slots.items():
                if name in tied or name in missing:
                    continue
                layer = name.removesuffix(".weight")
                if layer in layers and name.endswith(".weight"):
                    self._put_quantized(layer, layers[layer])
                else:
                    self._put_plain(name, plain[name], parameter)
                advance(1)
        for name, source in tied.items():
            self._tie(name.removesuffix(".weight"), source.removesuffix(".weight"))
        self._draw(missing)
        self._report(missing, [name for name in unexpected if name not in tied])

    def _here(self, name: str, stored_base: bool) -> str:
        return _named(name, stored_base, self.model)

    def _refuse_missing(self, missing: list[str]) -> None:
        """Only the small heads for other tasks may be drawn anew; without the network itself there is no model."""
        fatal = [
            name for name in missing if name.startswith((BASE_PREFIX, "lm_head.")) or not self.model.base_model_prefix
        ]
        if fatal:
            shown = ", ".join(fatal[:5]) + (f" and {len(fatal) - 5} more" if len(fatal) > 5 else "")
            raise CheckpointError(f"lacks {len(fatal)} of the model's tensors: {shown}")

    def _put_plain(self, name: str, stored: str, slot: Tensor) -> None:
        header = self.checkpoint.headers[stored]
        if header.shape != tuple(slot.shape):
            raise CheckpointError(f"tensor {stored!r} is {list(header.shape)}, but config.json says {list(slot.shape)}")
        if not header.dtype.is_floating_point:
            raise CheckpointError(f"tensor {stored!r} is {header.dtype}, a weight is floating-point")
        _set_parameter(self.model, name, nn.Parameter(self._plain(stored, name)))
        self._let_compute(name.rpartition(".")[0])

    def _plain(self, stored: str, name: str) -> Tensor:
        """A tensor in the model's type, where it belongs: in the file's own memory, if that is both already."""
        tensor = self.checkpoint.view(stored)
        if tensor.dtype != self.dtype and self.places.is_mapped(name):
            raise RequestError(
                f"{name} is to stay on disk, where it is {dtype_name(tensor.dtype)}: {dtype_name(self.dtype)} would be "
                "a copy in memory, so load it with dtype='auto'"
            )
        if self._stays_half(name, tensor):
            return tensor
        placed = _cast(tensor, self.dtype, stored).to(self.places.of(name))
        if placed is not tensor:
            self.checkpoint.forget(stored)
        return placed

    def _stays_half(self, name: str, tensor: Tensor) -> bool:
        """Whether an embedding or a head that a quantized checkpoint keeps in half precision stays so, though the model
        computes in float32: it may be the largest weight by far, and reading it decides how fast tokens are made."""
        last = name.removeprefix(BASE_PREFIX) in ("wte.weight", "lm_head.weight")
        here = self.places.of(name).type == "cpu" and self.dtype == torch.float32
        return last and here and self.format is not None and tensor.dtype != self.dtype and is_native(tensor)

    def _tie(self, layer: str, source: str) -> None:
        """Let one layer have another's weight, quantized or not."""
        module = self.model.get_submodule(source)
        if isinstance(module, QuantEmbedding):
            self.model.set_submodule(layer, module.table)
        else:
            _set_parameter(self.model, f"{layer}.weight", self.model.get_parameter(f"{source}.weight"))
        self._let_compute(layer)

    def _let_compute(self, layer: str) -> None:
        """A layer whose weight stayed in half precision must know of it."""
        module = self.model.get_submodule(layer)
        weight = module._parameters.get("weight")
        if weight is None or weight.dtype == self.dtype or weight.is_meta:
            return
        if type(module) is nn.Linear:
            self.model.set_submodule(layer, StoredLinear(weight, module._parameters.get("bias")))
        elif type(module) is nn.Embedding:
            self.model.set_submodule(layer, StoredEmbedding(weight, self.dtype))

    def _put_quantized(self, layer: str, stored: str) -> None:
        linear = self.model.get_submodule(layer)
        if not isinstance(linear, nn.Linear | nn.Embedding) or self.format is None:
            raise CheckpointError(f"{stored} is quantized, but only linear layers and embeddings can be")
        if self.places.is_mapped(f"{layer}.weight"):
            raise RequestError(
                f"{layer} is to stay on disk, but quantized weights are held in memory, as kernels want them"
            )
        with locate(stored):
            tensors = {suffix: self.checkpoint.view(stored + suffix) for suffix in self.layers[stored]}
            q = self.format.decode(tensors, tuple(linear.weight.shape), self.dtype)
            q = q.to(self.places.of(f"{layer}.weight"))
            if isinstance(linear, nn.Embedding):
                self.model.set_submodule(layer, QuantEmbedding(q, self.dtype))
                return
            bias = None
            if linear.bias is not None:
                if f"{stored}.bias" not in self.checkpoint.headers:
                    raise CheckpointError("lacks its bias")
                bias = self._plain(f"{stored}.bias", f"{layer}.bias")
                if bias.shape != linear.bias.shape:
                    raise CheckpointError(f"its bias is {list(bias.shape)}, config.json says {list(linear.bias.shape)}")
            self.model.set_submodule(layer, QuantLinear(q, bias, compute_dtype=self.compute_dtype))
            for suffix in self.layers[stored]:  # what the kernel uses where it lies comes back when it is used
                self.checkpoint.forget(stored + suffix)

    def _draw(self, names: list[str]) -> None:
        for name in names:
            slot = self.model.get_parameter(name)
            drawn = torch.empty(slot.shape, dtype=self.dtype, device=self.places.of(name))
            std = 0.0 if name.endswith(".bias") else self.model.config.initializer_range
            _set_parameter(self.model, name, nn.Parameter(nn.init.normal_(drawn, 0.0, std)))

    def _report(self, fresh: list[str], unexpected: list[str]) -> None:
        report = LoadReport(tuple(fresh), tuple(sorted(unexpected)), self.checkpoint.dropped)
        self.model.load_report = report
        source = self.checkpoint.source
        if report.fresh:
            warnings.warn(
                f"{source} has no weights for {', '.join(report.fresh)}: drawn at random, to be trained",
                LoadWarning,
                stacklevel=2,
            )
        if report.unexpected:
            warnings.warn(
                f"{source} also holds {', '.join(report.unexpected)}, which {type(self.model).__name__} does not use",
                LoadWarning,
                stacklevel=2,
            )


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in another type. Raises CheckpointError where a finite value would become infinite."""
    cast = tensor.to(dtype)
    if tensor.dtype != dtype == torch.float16 and not cast.isfinite().all() and tensor.isfinite().all():
        raise CheckpointError(
            f"tensor {name!r} reaches {tensor.abs().max().item():g}, and float16 ends at 65504: load it with "
            "dtype bfloat16 or float32"
        )
    return cast


def unit_sizes(checkpoint: Readable, model: Network, dtype: torch.dtype | str | None) -> dict[str, int]:
    """Bytes of each unit of the model, in the order of computing: quantized weights as stored, others in their type."""
    kind = resolve_dtype(dtype, model.config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    format = formats.detect(checkpoint.config, checkpoint.headers)
    layers = format.quantized(checkpoint.headers) if format else {}
    spelled = {layer + suffix for layer, suffixes in layers.items() for suffix in suffixes}
    tied, stored_base = bool(model.tied_weights()), _has_base_prefix(checkpoint.headers)
    units = [unit_of(name, tied) for name in dict(model.named_parameters(remove_duplicate=False))]
    sizes = dict.fromkeys(units, 0)
    for name, header in checkpoint.headers.items():
        unit = unit_of(_named(name, stored_base, model), tied)
        if unit in sizes:
            sizes[unit] += header.nbytes if name in spelled else header.numel * kind.itemsize
    return sizes


def _named(name: str, stored_base: bool, model: Network) -> str:
    """A stored name as this model calls it: a bare GPTNeoModel's tensors have no `transformer.` before them."""
    wanted_base = bool(model.base_model_prefix)
    if stored_base and not wanted_base:
        return name.removeprefix(BASE_PREFIX)
    if wanted_base and not stored_base:
        return BASE_PREFIX + name
    return name


def _has_base_prefix(names: Iterable[str]) -> bool:
    return any(name.startswith(BASE_PREFIX) for name in names)


def _set_parameter(model: nn.Module, name: str, value: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, value)
