"""Putting a checkpoint's tensors into an empty model, one at a time, each on its device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from neoquant.errors import CheckpointError, RequestError, ShapeError, locate
from neoquant.formats import Format
from neoquant.formats.base import dtype_name
from neoquant.loading.contents import Contents, Readable
from neoquant.loading.device_map import DeviceMap
from neoquant.model.base import LoadReport, Network
from neoquant.model.names import BASE_PREFIX, TABLES, canonical_layer
from neoquant.model.shapes import shape_problem
from neoquant.nn.linear import QuantEmbedding, QuantLinear, StoredEmbedding, StoredLinear, is_native
from neoquant.progress import Progress


class LoadWarning(UserWarning):
    """A checkpoint is not what its files or the model class promise, in a way that can be lived with."""


class NoInit(TorchFunctionMode):
    """Skips the initialization of weights: on the meta device, drawing none takes torch seconds of imports."""

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
        contents: Contents,
        dtype: torch.dtype,
        places: DeviceMap,
        compute_dtype: torch.dtype | None,
    ) -> None:
        self.checkpoint, self.model, self.format, self.contents = checkpoint, model, format, contents
        self.dtype, self.places, self.compute_dtype = dtype, places, compute_dtype

    def fill(self, progress: Progress) -> LoadReport:
        """Load every parameter of the model, and initialize those of a head that the checkpoint lacks.

        Raises CheckpointError for tensors of the network that are missing or have another shape.
        """
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        tied = self.model.tied_weights()
        available = self.contents.tensors
        missing = [name for name in parameters if name not in available and name not in tied]
        self._require_network(missing)
        with progress.task("loading", total=len(parameters)) as advance:
            for name, parameter in parameters.items():
                if name not in tied and name in available:
                    self._load(name, parameter)
                    advance(1)
        for name, source in tied.items():
            self._tie(name.removesuffix(".weight"), source.removesuffix(".weight"))
        self._initialize(missing)
        unexpected = sorted(name for name in available if name not in parameters)
        return LoadReport(tuple(missing), tuple(unexpected), self.checkpoint.dropped)

    def _require_network(self, missing: list[str]) -> None:
        """Only the small heads for other tasks may be missing; without the network itself there is no model."""
        fatal = [
            name for name in missing if name.startswith((BASE_PREFIX, "lm_head.")) or not self.model.base_model_prefix
        ]
        if fatal:
            shown = ", ".join(fatal[:5]) + (f" and {len(fatal) - 5} more" if len(fatal) > 5 else "")
            raise CheckpointError(f"lacks {len(fatal)} of the model's tensors: {shown}")

    def _load(self, name: str, parameter: Tensor) -> None:
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and layer in self.contents.layers:
            self._load_quantized(layer, self.contents.layers[layer])
        else:
            self._load_plain(name, self.contents.plain[name], parameter)

    def _load_plain(self, name: str, stored: str, parameter: Tensor) -> None:
        header = self.checkpoint.headers[stored]
        if problem := shape_problem({stored: header.shape}, {stored: tuple(parameter.shape)}):
            raise ShapeError(problem)
        if not header.dtype.is_floating_point:
            raise CheckpointError(f"tensor {stored!r} is {header.dtype}, a weight is floating-point")
        _set_parameter(self.model, name, nn.Parameter(self._tensor(stored, name)))
        self._compute_with_stored_type(name.rpartition(".")[0])

    def _tensor(self, stored: str, name: str) -> Tensor:
        """A tensor in the model's type, on its device: in the file's own memory, if it is both already."""
        tensor = self.checkpoint.view(stored)
        if tensor.dtype != self.dtype and self.places.is_mapped(name):
            raise RequestError(
                f"{name} is to stay on disk, where it is {dtype_name(tensor.dtype)}: {dtype_name(self.dtype)} would be "
                "a copy in memory, so load it with dtype='auto'"
            )
        if self.places.is_mapped(name):
            self.checkpoint.forget(stored)  # it is read again when it is used
        if self._keeps_stored_type(name, tensor):
            return tensor
        placed = _cast(tensor, self.dtype, stored).to(self.places.of(name))
        if placed is not tensor:
            self.checkpoint.forget(stored)
        return placed

    def _keeps_stored_type(self, name: str, tensor: Tensor) -> bool:
        """Whether an embedding or a head that a quantized checkpoint keeps in half precision stays so, though the model
        computes in float32: it may be the largest weight by far, and reading it decides how fast tokens are made."""
        is_table = name.endswith(".weight") and canonical_layer(name) in TABLES
        in_float32 = self.places.of(name).type == "cpu" and self.dtype == torch.float32
        return is_table and in_float32 and self.format is not None and tensor.dtype != self.dtype and is_native(tensor)

    def _compute_with_stored_type(self, layer: str) -> None:
        """Where a layer's weight keeps another type than the model's, give it a layer that computes with it."""
        module = self.model.get_submodule(layer)
        weight = module._parameters.get("weight")
        if weight is None or weight.dtype == self.dtype or weight.is_meta:
            return
        if type(module) is nn.Linear:
            self.model.set_submodule(layer, StoredLinear(weight, module._parameters.get("bias")))
        elif type(module) is nn.Embedding:
            self.model.set_submodule(layer, StoredEmbedding(weight, self.dtype))

    def _load_quantized(self, layer: str, stored: str) -> None:
        module = self.model.get_submodule(layer)
        if not isinstance(module, nn.Linear | nn.Embedding) or self.format is None:
            raise CheckpointError(f"{stored} is quantized, but only linear layers and embeddings can be")
        if self.places.is_mapped(f"{layer}.weight"):
            raise RequestError(
                f"{layer} is to stay on disk, but quantized weights are held in memory, as kernels want them"
            )
        suffixes = self.contents.suffixes[stored]
        with locate(stored):
            tensors = {suffix: self.checkpoint.view(stored + suffix) for suffix in suffixes}
            q = self.format.decode(tensors, tuple(module.weight.shape), self.dtype)
            q = q.to(self.places.of(f"{layer}.weight"))
            if isinstance(module, nn.Embedding):
                self.model.set_submodule(layer, QuantEmbedding(q, self.dtype))
                return
            bias = None if module.bias is None else self._bias(layer, stored, module.bias)
            self.model.set_submodule(layer, QuantLinear(q, bias, compute_dtype=self.compute_dtype))
            for suffix in suffixes:  # what the kernel uses where it lies comes back when it is used
                self.checkpoint.forget(stored + suffix)

    def _bias(self, layer: str, stored: str, parameter: Tensor) -> Tensor:
        """The bias of a quantized layer."""
        if f"{stored}.bias" not in self.checkpoint.headers:
            raise CheckpointError("lacks its bias")
        bias = self._tensor(f"{stored}.bias", f"{layer}.bias")
        if bias.shape != parameter.shape:
            raise CheckpointError(f"its bias is {list(bias.shape)}, config.json says {list(parameter.shape)}")
        return bias

    def _tie(self, layer: str, source: str) -> None:
        """Let one layer have another's weight, quantized or not."""
        module = self.model.get_submodule(source)
        if isinstance(module, QuantEmbedding):
            self.model.set_submodule(layer, module.table)
        else:
            _set_parameter(self.model, f"{layer}.weight", self.model.get_parameter(f"{source}.weight"))
        self._compute_with_stored_type(layer)

    def _initialize(self, names: Iterable[str]) -> None:
        """Initialize parameters as GPT-Neo's are: normal(0, initializer_range), biases zero."""
        for name in names:
            shape = self.model.get_parameter(name).shape
            value = torch.empty(shape, dtype=self.dtype, device=self.places.of(name))
            std = 0.0 if name.endswith(".bias") else self.model.config.initializer_range
            _set_parameter(self.model, name, nn.Parameter(nn.init.normal_(value, 0.0, std)))


def warn_of(report: LoadReport, source: str, model: Network) -> None:
    """A LoadWarning for what checkpoint and model do not have in common."""
    if report.missing:
        names = ", ".join(report.missing)
        warnings.warn(
            f"{source} has no weights for {names}: newly initialized, to be trained", LoadWarning, stacklevel=3
        )
    # A tied head that is stored as well has been found equal to the embedding.
    if unexpected := [name for name in report.unexpected if name not in model.tied_weights()]:
        names = ", ".join(unexpected)
        warnings.warn(
            f"{source} also holds {names}, which {type(model).__name__} does not use", LoadWarning, stacklevel=3
        )


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in another type. Raises CheckpointError where a finite value would become infinite."""
    cast = tensor.to(dtype)
    narrows = tensor.dtype != dtype == torch.float16 or tensor.dtype == torch.float64
    if narrows and not cast.isfinite().all() and tensor.isfinite().all():
        end = torch.finfo(dtype).max
        wider = ": load it with dtype bfloat16 or float32" if dtype == torch.float16 else ""
        raise CheckpointError(
            f"tensor {name!r} reaches {tensor.abs().max().item():g}, and {dtype_name(dtype)} ends at {end:g}{wider}"
        )
    return cast


def _set_parameter(model: nn.Module, name: str, value: nn.Parameter) -> None:
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, value)
