"""From a checkpoint to something that runs, and back: plain or quantized, by folder or by name."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from neoquant import formats
from neoquant.checkpoint import CheckpointWriter, TensorHeader, companion_files, find_companions, open_checkpoint
from neoquant.demo import MODEL
from neoquant.errors import CheckpointError, RequestError, locate
from neoquant.formats import Format
from neoquant.formats.base import dtype_name
from neoquant.kernels import ACTIVATIONS
from neoquant.layer import QuantEmbedding, QuantLinear, StoredEmbedding, StoredLinear, is_native
from neoquant.model.attention import why_not
from neoquant.model.config import GPTNeoConfig
from neoquant.model.generation_config import FILE as GENERATION_FILE
from neoquant.model.generation_config import GenerationConfig
from neoquant.model.gpt_neo import Block, GPTNeoForCausalLM
from neoquant.model.pretrained import LoadReport, PreTrainedModel
from neoquant.model.tokenizer import Tokenizer
from neoquant.placement import Placement, place, unit_of
from neoquant.progress import SILENT, Progress
from neoquant.step import native_step

ModelT = TypeVar("ModelT", bound=PreTrainedModel)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BASE = "transformer."


class LoadWarning(UserWarning):
    """A checkpoint and a model class do not hold the same tensors, in a way that can be lived with."""


def load(
    source: str | Path | None = None,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
    attn_implementation: str = "sdpa",
    activations: str = "exact",
    progress: Progress = SILENT,
) -> tuple[GPTNeoForCausalLM, Tokenizer]:
    """A language model and its tokenizer, from a folder or by id on the hub; None is the bundled model.

    Arguments and errors are `load_model`'s.
    """
    source = MODEL if source is None else source
    with open_checkpoint(source, revision=revision, progress=progress) as checkpoint:
        tokenizer = Tokenizer.from_folder(_folder(checkpoint))
        model = read_model(
            checkpoint,
            GPTNeoForCausalLM,
            dtype=dtype,
            device=device,
            attn_implementation=attn_implementation,
            activations=activations,
            progress=progress,
        )
    return model, tokenizer


def load_tokenizer(source: str | Path | None = None, *, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a folder, or of a hub id without its weights. Raises CheckpointError where there is none."""
    return Tokenizer.from_folder(find_companions(MODEL if source is None else source, revision=revision))


def load_model(
    source: str | Path,
    cls: type[ModelT],
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: object = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    attn_implementation: str = "sdpa",
    activations: str = "exact",
    progress: Progress = SILENT,
) -> ModelT:
    """A model of class `cls`, in evaluation mode.

    Args:
        source: a folder, or an id on the hub at `revision`.
        dtype: what activations are computed in and plain weights are held in: a torch type, its name, "auto" (the
            checkpoint's own), or None: float32 on a CPU, float16 on a GPU. Quantized weights stay as they are stored.
        device: "cpu", "cuda", "cuda:1", 1, a torch device, or None (a GPU if there is one); "auto" (GPUs, then memory,
            then disk, as they have room) or a mapping of parts to devices: see `placement`.
        max_memory: for "auto", device number or "cpu" -> bytes, or a text like "2GB".
        attn_implementation: "sdpa", "eager", "flex_attention", or "flash_attention_2" (the package flash-attn on CUDA).
        activations: "exact", or "int8": what quantized weights are multiplied with is rounded as well, which is faster
            for many tokens, and loses a little.
        progress: told of every tensor.

    Raises:
        CheckpointError: files are missing or damaged, tensors are missing or have other shapes.
        FormatError: the weights are quantized in a way that neoquant does not read.
        HubError: the hub cannot be reached or does not have it.
        RequestError: an illegal dtype, device, attention or activations, or nothing is quantized for int8 activations.

    Warns:
        LoadWarning: tensors that the model has no place for, and heads that the checkpoint has no weights for.
    """
    with open_checkpoint(source, revision=revision, progress=progress) as checkpoint:
        return read_model(
            checkpoint,
            cls,
            dtype=dtype,
            device=device,
            max_memory=max_memory,
            attn_implementation=attn_implementation,
            activations=activations,
            progress=progress,
        )


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
    def view(self, name: str) -> Tensor: ...
    def forget(self, name: str) -> None: ...


def read_model(
    checkpoint: Readable,
    cls: type[ModelT],
    *,
    dtype: torch.dtype | str | None = None,
    device: object = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    attn_implementation: str = "sdpa",
    activations: str = "exact",
    compute_dtype: torch.dtype | None = None,
    progress: Progress = SILENT,
) -> ModelT:
    """`load_model` on a checkpoint that is open; `compute_dtype` instead of the one it states for quantized weights."""
    with locate(f"{checkpoint.source}/config.json"):
        config = GPTNeoConfig.from_dict(checkpoint.config)
    if activations not in ACTIVATIONS:
        raise RequestError(f"activations are {activations!r}; legal are {' and '.join(ACTIVATIONS)}")
    with torch.device("meta"), _Undrawn():
        model = cls(config, attn_implementation)
    places = place(device, max_memory, _sizes(checkpoint, model, dtype), bool(model.tied_weights()))
    kind = resolve_dtype(dtype, config, places.first)
    if reason := why_not(attn_implementation, kind, places.first):
        raise RequestError(f"attn_implementation {attn_implementation!r} is not possible here: {reason}")
    with locate(str(checkpoint.source)):
        format = formats.detect(checkpoint.config, checkpoint.headers)
        if format is None and activations != "exact":
            raise RequestError(f"no weight is quantized, so that {activations} activations would meet none")
        if compute_dtype is None and format is not None:
            compute_dtype = format.compute_dtype(checkpoint.config.get("quantization_config") or {})
        _Filling(checkpoint, model, format, kind, places, compute_dtype).run(progress)
    if len(set(places.units.values())) > 1:
        model.hf_device_map = places.describe()
    if activations != "exact":
        for module in model.modules():
            if isinstance(module, QuantLinear):
                module.set_activations(activations)
    for module in model.modules():
        if isinstance(module, Block):
            module.step = native_step
    if isinstance(model, GPTNeoForCausalLM):
        model.generation_config, faults = GenerationConfig.from_folder(_folder(checkpoint))
        for fault in faults:
            warnings.warn(f"{checkpoint.source}/generation_config.json: {fault}; left out", LoadWarning, stacklevel=2)
    return model.eval()


def _sizes(checkpoint: Readable, model: PreTrainedModel, dtype: torch.dtype | str | None) -> dict[str, int]:
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


class _Undrawn(TorchFunctionMode):
    """Leaves fresh weights as they are: on the meta device, drawing none of them takes torch seconds of imports."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


class _Filling:
    """Puts a checkpoint's tensors into an empty model, one at a time."""

    def __init__(
        self,
        checkpoint: Readable,
        model: PreTrainedModel,
        format: Format | None,
        dtype: torch.dtype,
        places: Placement,
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
        fatal = [name for name in missing if name.startswith((BASE, "lm_head.")) or not self.model.base_model_prefix]
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
        last = name.removeprefix(BASE) in ("wte.weight", "lm_head.weight")
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


def save_model(model: PreTrainedModel, folder: str | Path, *, force: bool = False) -> None:
    """Write a model's configuration and weights as a folder that transformers and neoquant read.

    Quantized layers are written in the format that holds them all, without rounding again. A folder that `force`
    replaces hands its tokenizer and other companions on. Raises OutputError where the folder exists already (and is
    not replaced by `force`), and leaves nothing half-written.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    layers = {name.removesuffix(".table"): layer for name, layer in layers.items()}  # of an embedding
    everywhere = model.named_modules(remove_duplicate=False)  # a tied head is the embedding's table, met once more
    held = [(name, module) for name, module in everywhere if isinstance(module, QuantLinear)]
    inside = {f"{name}.{buffer}" for name, layer in held for buffer in dict(layer.named_buffers())}
    tables = [module for module in model.modules() if isinstance(module, QuantEmbedding)]
    targets = {name: (layer.grid, layer.shape) for name, layer in layers.items()}
    ordered = [name for name, layer in layers.items() if layer.ordered]
    format = formats.choose(targets, embeddings=bool(tables), ordered=ordered) if layers else None
    tied = model.tied_weights()
    plain = {name: tensor for name, tensor in model.state_dict().items() if name not in tied and name not in inside}
    config = model.config.to_dict() | {
        "architectures": [type(model).__name__],
        "dtype": dtype_name(model.dtype),
    }
    config.pop("quantization_config", None)
    if format is not None:
        kept = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        config["quantization_config"] = format.config(
            {name: layer.grid for name, layer in layers.items()},
            kept,
            ordered=bool(ordered),
        )
        computed = {layer.compute_dtype for layer in layers.values()} - {None}
        if format.compute_key and len(computed) == 1:
            config["quantization_config"][format.compute_key] = dtype_name(*computed)  # type: ignore[arg-type]
    with CheckpointWriter(folder, tensors=len(plain) + 8 * len(layers), force=force) as sink:
        for name, tensor in plain.items():
            sink.put(name, tensor.detach().cpu())
        for name, layer in layers.items():
            if format is not None:
                for suffix, tensor in format.encode(layer.quantized.to("cpu")).items():
                    sink.put(name + suffix, tensor)
        files: dict[str, Path | str] = {path.name: path for path in companion_files(Path(folder))}
        if isinstance(model, GPTNeoForCausalLM) and model.generation_config.to_dict():
            files[GENERATION_FILE] = json.dumps(model.generation_config.to_dict(), indent=2, sort_keys=True) + "\n"
        sink.finish(config, files=files)


def resolve_dtype(dtype: torch.dtype | str | None, config: GPTNeoConfig, device: torch.device) -> torch.dtype:
    """A type from what a user may say. Raises RequestError for one that a model cannot compute in."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.float16
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        name = (config.dtype or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise RequestError(f"dtype is {str(dtype)!r}; legal are auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in another type. Raises CheckpointError where a finite value would become infinite."""
    cast = tensor.to(dtype)
    if tensor.dtype != dtype == torch.float16 and not cast.isfinite().all() and tensor.isfinite().all():
        raise CheckpointError(
            f"tensor {name!r} reaches {tensor.abs().max().item():g}, and float16 ends at 65504: load it with "
            "dtype bfloat16 or float32"
        )
    return cast


def _folder(checkpoint: Readable) -> Path:
    assert checkpoint.folder is not None, "opened with its files"
    return checkpoint.folder


def _named(name: str, stored_base: bool, model: PreTrainedModel) -> str:
    """A stored name as this model calls it: a bare GPTNeoModel's tensors have no `transformer.` before them."""
    wanted_base = bool(model.base_model_prefix)
    if stored_base and not wanted_base:
        return name.removeprefix(BASE)
    if wanted_base and not stored_base:
        return BASE + name
    return name


def _has_base_prefix(names: Iterable[str]) -> bool:
    return any(name.startswith(BASE) for name in names)


def _set_parameter(model: nn.Module, name: str, value: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, value)
