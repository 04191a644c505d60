"""From a model back to a folder, plain or quantized."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from neoquant import formats
from neoquant.checkpoint import CheckpointWriter, companion_files
from neoquant.formats.base import dtype_name
from neoquant.model.base import Network
from neoquant.nn.linear import QuantEmbedding, QuantLinear


def save_model(model: Network, folder: str | Path, *, force: bool = False) -> None:
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
        files |= model.companions()
        sink.finish(config, files=files)
