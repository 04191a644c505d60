"""From a checkpoint, plain or quantized, to a model that runs."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from neoquant import formats
from neoquant.checkpoint import open_checkpoint
from neoquant.errors import CheckpointError, RequestError, locate
from neoquant.kernels import ACTIVATIONS, Reference
from neoquant.loading.contents import Contents, Readable
from neoquant.loading.device_map import DeviceMap, assign_devices
from neoquant.loading.fill import Filler, LoadWarning, NoInit, warn_of
from neoquant.model.attention import require_possible
from neoquant.model.base import Network
from neoquant.model.config import GPTNeoConfig
from neoquant.model.devices import cpu_by_default
from neoquant.model.dtypes import resolve_dtype
from neoquant.model.gpt_neo import Block, CausalLM, Decoder
from neoquant.model.names import BASE_PREFIX, in_block
from neoquant.nn.block_step import block_step
from neoquant.nn.direct_pass import DirectPass
from neoquant.nn.fused_blocks import fused_blocks
from neoquant.nn.linear import QuantLinear
from neoquant.progress import SILENT, Progress
from neoquant.sizes import plural

ModelT = TypeVar("ModelT", bound=Network)


@cpu_by_default()
def load_model(
    source: str | Path | None,
    cls: type[ModelT],
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: object = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    attn_implementation: str = "sdpa",
    activations: str = "exact",
    mmap: bool = True,
    settings: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
) -> ModelT:
    """A model of class `cls`, in evaluation mode.

    Args:
        source: a folder, or an id on the hub at `revision`.
        dtype: what activations are computed in and plain weights are held in: a torch type, its name, "auto" (the
            checkpoint's own), or None: float32 on a CPU, bfloat16 on a GPU. Quantized weights stay as they are stored.
        device: "cpu", "cuda", "cuda:1", 1, a torch device, or None (a GPU if there is one); "auto" (GPUs, then memory,
            then disk, as they have room) or a mapping of parts to devices: see `placement`.
        max_memory: for "auto", device number or "cpu" -> bytes, or a text like "2GB".
        attn_implementation: "sdpa", "eager", "flex_attention", or "flash_attention_2" (the package flash-attn on CUDA).
        activations: "exact", or "int8": what quantized weights are multiplied with is rounded as well, which is faster
            for many tokens, and loses a little.
        mmap: weights that stay as they are stored lie in the file's own memory; False copies them, so that the model
            outlives a file that is cut short or rewritten.
        settings: what counts before config.json: `num_labels`, `id2label` and so on, of a head that is to be trained;
            `use_cache`, `resid_dropout` and other settings that change no weight.
        progress: told of every tensor.

    Raises:
        CheckpointError: files are missing or damaged, tensors are missing or have other shapes.
        FormatError: the weights are quantized in a way that neoquant does not read.
        HubError: the hub cannot be reached or does not have it.
        RequestError: an illegal dtype, device, attention or activations, or nothing is quantized for int8 activations.

    Warns:
        LoadWarning: tensors that the model has no place for, heads that the checkpoint has no weights for, and what is
            unusual about its files and was dealt with (`Checkpoint.notes`).
    """
    with open_checkpoint(source, revision=revision, mmap=mmap, progress=progress) as checkpoint:
        return read_model(
            checkpoint,
            cls,
            dtype=dtype,
            device=device,
            max_memory=max_memory,
            attn_implementation=attn_implementation,
            activations=activations,
            settings=settings,
            progress=progress,
        )


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
    settings: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
) -> ModelT:
    """`load_model` on a checkpoint that is open; `compute_dtype` instead of the one it states for quantized weights."""
    with locate(f"{checkpoint.source}/config.json"):
        config = GPTNeoConfig.from_dict(_overridden(checkpoint.config, settings or {}))
    if activations not in ACTIVATIONS:
        raise RequestError(f"activations are {activations!r}; legal are {' and '.join(ACTIVATIONS)}")
    with locate(str(checkpoint.source)):
        require_fit(config, checkpoint.headers)
    with locate(f"{checkpoint.source}/config.json"), torch.device("meta"), NoInit():
        model = cls(config, attn_implementation)
    with locate(str(checkpoint.source)):
        format, notes = formats.detect_checked(checkpoint.config, checkpoint.headers, checkpoint.view)
        if format is None and activations != "exact":
            raise RequestError(f"no weight is quantized, so that {activations} activations would meet none")
    contents = Contents.of(checkpoint, model, format)
    places = _assign_devices(contents, model, dtype, device, max_memory)
    kind = resolve_dtype(dtype, config, places.first, contents.dtype)
    require_possible(attn_implementation, kind, places.first)
    with locate(str(checkpoint.source)):
        if compute_dtype is None and format is not None:
            stated = format.compute_dtype(checkpoint.config.get("quantization_config") or {})
            # What every folder states by default: on a GPU it would mean no tensor cores, and a cast before and behind.
            compute_dtype = None if stated == torch.float32 and places.first.type == "cuda" else stated
        model.load_report = Filler(checkpoint, model, format, contents, kind, places, compute_dtype).fill(progress)
    if len(set(places.units.values())) > 1:
        model.hf_device_map = places.describe()
    model.name_or_path = str(checkpoint.source)
    model.quantization_format = None if format is None else format.name
    checkpoint.require_unchanged()
    slow = _arrange(model, activations)
    warn_of(model.load_report, checkpoint.source, model)
    remarks = [f": {note}" for note in (*checkpoint.notes, *notes, *slow)]
    remarks += [f"/{remark}" for remark in model.read_companions(folder_of(checkpoint))]
    for remark in remarks:
        warnings.warn(f"{checkpoint.source}{remark}", LoadWarning, stacklevel=2)
    return model.eval()


def _overridden(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with other settings: what it says of labels' number and names goes with one of them."""
    replaced = ("num_labels", "id2label", "label2id")
    kept = {key: value for key, value in config.items() if key not in replaced or not set(replaced) & settings.keys()}
    return {**kept, **settings}


def _assign_devices(
    contents: Contents,
    model: Network,
    dtype: torch.dtype | str | None,
    device: object,
    max_memory: Mapping[int | str, int | str] | None,
) -> DeviceMap:
    """Where each unit of the model goes. Sizes count in the type that it would have on a GPU, if there is one."""
    likely = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = contents.unit_sizes(model, resolve_dtype(dtype, model.config, likely, contents.dtype))
    return assign_devices(device, max_memory, sizes, bool(model.tied_weights()))


def _arrange(model: Network, activations: str) -> list[str]:
    """Let quantized layers and blocks compute in the way that was asked for, and fast; what is slow that way."""
    slow: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, QuantLinear) and activations != "exact":
            before = module.kernel
            module.set_activations(activations)
            slow[module.grid.name] += isinstance(module.kernel, Reference) and not isinstance(before, Reference)
        if isinstance(module, Block):
            module.step = block_step
        if isinstance(module, Decoder):
            module.steps = fused_blocks
        if isinstance(module, CausalLM):
            module.direct_pass = DirectPass
    return [
        f"with {activations} activations {plural(count, 'layer')} on the grid {name} are computed by plain torch, many "
        "times slower than with exact ones, for which there is a fast way"
        for name, count in slow.items() if count
    ]  # fmt: skip


def require_fit(config: GPTNeoConfig, names: Iterable[str]) -> None:
    """Raise CheckpointError, before a network is built, where `config.json` promises blocks that no tensor is of."""
    inside = (name for name in names if name.removeprefix(BASE_PREFIX).startswith("h."))
    numbers = {place[0] for name in inside if (place := in_block(name)) is not None}
    if len(numbers) < config.num_layers:
        raise CheckpointError(
            f"config.json says num_layers = {config.num_layers:,}, the tensors are of {plural(len(numbers), 'block')}"
        )


def folder_of(checkpoint: Readable) -> Path:
    assert checkpoint.folder is not None, "opened with its files"
    return checkpoint.folder
