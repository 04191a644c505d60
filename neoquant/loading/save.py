"""From a model back to a folder, plain or quantized."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neoquant import formats
from neoquant.checkpoint import SHARD_SIZE, CheckpointWriter, Push, companion_files
from neoquant.checkpoint.upload import CARD, push_files, require_repo
from neoquant.checkpoint.weight_files import CONFIG, is_written
from neoquant.errors import CheckpointError, RequestError
from neoquant.files.reading import read_json
from neoquant.files.writing import write_file
from neoquant.formats import Format
from neoquant.formats.base import dtype_name
from neoquant.model.base import Network
from neoquant.model.names import left_out
from neoquant.nn.linear import QuantEmbedding, QuantLinear
from neoquant.sizes import parse_size

HALVES = (torch.float16, torch.bfloat16)


def save_model(model: Network, folder: str | Path, *, force: bool = False, shard_size: int | str = SHARD_SIZE) -> None:
    """Write a model's configuration and weights as a folder that transformers and neoquant read.

    Quantized layers are written in the format that they were loaded from, or else in the first that holds them all,
    without rounding again. What lies in the folder beside a model (a tokenizer, a license) is kept. A model of the same
    kind that was saved there before (`_replaced`) is replaced at once, when the new one is complete; any other only
    with `force`. So is the folder from which this model's weights are mapped: its files live on until they are let go.
    `shard_size` bounds a weight file, in bytes or like "5GB".

    Raises OutputError where something else is there already (and is not replaced by `force`), RequestError for what is
    no size, and leaves nothing half-written.
    """
    largest = parse_size(shard_size, "max_shard_size")
    weights = _Weights.of(model, model.tied_weights())
    format = _choose_format(model, weights)
    dtype = None if format is None else _common_type(weights.plain.values())
    companions = companion_files(Path(folder))
    config = _config(model, weights, format, dtype)
    names = [*(path.name for path in companions), *_replaced(Path(folder), config)]
    with CheckpointWriter(folder, tensors=weights.count, force=force, shard_size=largest, keeps=names) as sink:
        for name, tensor in _tensors(weights, format, dtype):
            sink.put(name, tensor)
        files: dict[str, Path | str] = {path.name: path for path in companions}
        files |= model.companions()
        sink.finish(config, files=files)


def push_model(
    model: Network,
    repo: str,
    *,
    shard_size: int | str = SHARD_SIZE,
    private: bool = False,
    revision: str = "main",
    message: str | None = None,
    token: str | None = None,
) -> Push:
    """Send the model to `repo` ("user/name") in one commit, as `save_model` writes it.

    A model card is made where the hub has none; what is there beside the weights, a tokenizer for one, stays.
    Arguments and errors are `neoquant.checkpoint.push`'s.
    """
    from neoquant.quantization.model_card import render_saved_card  # a tenth of a second, where only this is loaded

    require_repo(repo)
    with tempfile.TemporaryDirectory(prefix="neoquant-push-") as temp:
        folder = Path(temp) / repo.rpartition("/")[2]
        save_model(model, folder, shard_size=shard_size)
        grids = {layer.grid for layer in _Weights.of(model, model.tied_weights()).quantized.values()}
        write_file(folder / CARD, render_saved_card(repo, read_json(folder / CONFIG), grids))
        return push_files(folder, repo, private=private, revision=revision, message=message, token=token)


def tensors_of(model: nn.Module, tied: Iterable[str], format: Format) -> dict[str, Tensor]:
    """What `save_model` writes of a model's weights, in this format, by name; those `tied` are another's and left out.

    Raises FormatError for what the format cannot hold.
    """
    weights = _Weights.of(model, tied)
    return dict(_tensors(weights, format, _common_type(weights.plain.values())))


def choose_format(model: Network) -> tuple[Format, dict[str, Any]] | None:
    """The format that a model is saved in, and what config.json says of it; None where nothing is quantized."""
    weights = _Weights.of(model, model.tied_weights())
    format = _choose_format(model, weights)
    return None if format is None else (format, _quantization_config(model, weights, format))


@dataclass(frozen=True)
class _Weights:
    """A model's weights, each once: quantized layers by their stored names, and plain tensors."""

    quantized: Mapping[str, QuantLinear]
    plain: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, tied: Iterable[str]) -> _Weights:
        # A quantized embedding's table is a layer inside it, and its weight is stored under the embedding's name. A
        # tied head is that very layer, so that the model has two names for what is inside it.
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
        inside = {
            f"{name}.{buffer}"
            for name, layer in model.named_modules(remove_duplicate=False)
            if isinstance(layer, QuantLinear)
            for buffer in dict(layer.named_buffers())
        }
        left_out = inside | set(tied)
        return cls(
            quantized={name.removesuffix(".table"): layer for name, layer in layers.items()},
            plain={name: tensor.detach() for name, tensor in model.state_dict().items() if name not in left_out},
        )

    @property
    def count(self) -> int:
        """Tensors that will be stored, about."""
        return len(self.plain) + 8 * len(self.quantized)

    @property
    def ordered(self) -> list[str]:
        """Layers with an activation order."""
        return [name for name, layer in self.quantized.items() if layer.ordered]


def _choose_format(model: Network, weights: _Weights) -> Format | None:
    """The format that the model was loaded from if it holds every layer, else the first that does; None for none."""
    if not weights.quantized:
        return None
    targets = {name: (layer.grid, layer.shape) for name, layer in weights.quantized.items()}
    embeddings = any(isinstance(module, QuantEmbedding) for module in model.modules())
    for wanted in (model.quantization_format, "auto"):
        if wanted is not None:
            try:
                return formats.choose(targets, wanted, embeddings=embeddings, ordered=weights.ordered)
            except RequestError:
                if wanted == "auto":
                    raise
    raise AssertionError("auto returns or raises")


def _common_type(tensors: Iterable[Tensor]) -> torch.dtype:
    """One type for all tensors beside quantized layers: a half type that holds their values exactly, else float32.

    In memory some may be in float32 and others as they were stored; other programs run only one type.
    """
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    found = [dtype for dtype in HALVES if any(tensor.dtype == dtype for tensor in floats)]
    for dtype in dict.fromkeys((*found, *HALVES)):
        if all(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for tensor in floats):
            return dtype
    return torch.float32


def _tensors(weights: _Weights, format: Format | None, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Each tensor to store, on the CPU: plain ones in `dtype`, or as they are."""
    for name, tensor in weights.plain.items():
        cast = dtype is not None and tensor.is_floating_point()
        yield name, tensor.to("cpu", dtype if cast else tensor.dtype)
    for name, layer in weights.quantized.items():
        assert format is not None
        for suffix, tensor in format.encode(layer.quantized.to("cpu")).items():
            yield name + suffix, tensor


_SAME = ("model_type", "architectures", "hidden_size", "num_layers")


def _replaced(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """The files that were saved in a folder, if a model of this config.json may take their place without being asked.

    That is what a training loop does that saves at every epoch. A model of another class or size, or one that is
    quantized otherwise or not at all, or has plain weights in more bits, is worth a question.
    """
    try:
        there = read_json(folder / CONFIG)
    except CheckpointError:
        return []
    if not isinstance(there, dict) or any(there.get(name) != config.get(name) for name in _SAME):
        return []
    former, now = there.get("quantization_config"), config.get("quantization_config")
    if isinstance(former, dict) and isinstance(now, dict):
        same = all(former[name] == now[name] for name in former.keys() & now.keys())
    else:
        same = former is now is None
    dtype = there.get("dtype", there.get("torch_dtype"))
    if not same or config["dtype"] not in (dtype, "float32"):
        return []
    return [path.name for path in folder.iterdir() if is_written(path.name)]


def _config(model: Network, weights: _Weights, format: Format | None, dtype: torch.dtype | None) -> dict[str, Any]:
    """config.json of the folder."""
    config = model.config.to_dict() | {
        "architectures": [type(model).__name__],
        "dtype": dtype_name(dtype or model.dtype),
    }
    config.pop("quantization_config", None)
    return config if format is None else config | {"quantization_config": _quantization_config(model, weights, format)}


def _quantization_config(model: Network, weights: _Weights, format: Format) -> dict[str, Any]:
    """What config.json says of the quantized layers."""
    kept = left_out(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    grids = {name: layer.grid for name, layer in weights.quantized.items()}
    stated = format.config(grids, kept, ordered=bool(weights.ordered))
    computed = {layer.compute_dtype for layer in weights.quantized.values()} - {None}
    if format.compute_key and len(computed) == 1:
        stated[format.compute_key] = dtype_name(*computed)  # type: ignore[arg-type]
    return stated
