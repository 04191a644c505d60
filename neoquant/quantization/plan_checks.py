"""What a checkpoint must be before a plan is made of it."""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch

from neoquant.checkpoint import Checkpoint, TensorHeader
from neoquant.errors import CheckpointError, FormatError, RequestError
from neoquant.formats import Format, detect
from neoquant.formats.base import dtype_name
from neoquant.formats.others import GIVE_THE_ORIGINAL
from neoquant.model.config import GPTNeoConfig
from neoquant.model.names import canonical_tensor
from neoquant.model.shapes import head_shapes, network_shapes, shape_problem
from neoquant.quantization.plan_rows import is_linear_weight

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""What a weight that is to be quantized may be stored as."""


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise RequestError for a checkpoint whose weights are quantized already."""
    try:
        found = detect(checkpoint.config, checkpoint.headers)
    except FormatError as error:
        raise RequestError(f"{checkpoint.source} is already quantized: {error}") from error
    if found is not None:
        raise RequestError(
            f"{checkpoint.source} is already quantized (format {found.name}), and quantizing twice loses twice: "
            f"{GIVE_THE_ORIGINAL}; to use this one as it is, neoquant generate, eval and compare take it"
        )


def require_tensors(names: Iterable[str], config: GPTNeoConfig) -> None:
    """Raise CheckpointError naming the tensors that the configuration promises and that `names` lack.

    The language model's head is promised where it is untied and config.json names that class.
    """
    found = {canonical_tensor(name) for name in names}
    expected = [*network_shapes(config)]
    if "GPTNeoForCausalLM" in (config.extra.get("architectures") or ()):
        expected += head_shapes(config)
    if missing := [name for name in expected if name not in found]:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise CheckpointError(f"lacks {len(missing)} of the model's tensors: {shown}; {_sizes(config)}")


def require_network(headers: Iterable[TensorHeader], config: GPTNeoConfig) -> None:
    """Every tensor that the configuration promises is there, in its shape and a floating type.

    Raises CheckpointError naming the first that is missing, has another shape or type, or belongs to no block.
    """
    found = {canonical_tensor(header.name): header for header in headers}
    require_tensors(found, config)
    expected, sizes = network_shapes(config), _sizes(config)
    linears = {name: header for name, header in found.items() if is_linear_weight(header)}
    if unexpected := [name for name in linears if name not in expected]:
        raise CheckpointError(f"{min(unexpected)} unexpected: {sizes}")
    expected |= head_shapes(config)
    if problem := shape_problem({name: header.shape for name, header in found.items()}, expected):
        raise CheckpointError(f"{problem}: {sizes}")
    for name, header in found.items():
        if name in expected and not header.dtype.is_floating_point:
            raise CheckpointError(f"{name} is {dtype_name(header.dtype)}, and a weight is floating-point")
        if name in linears and header.dtype not in FLOATS:
            legal = ", ".join(map(dtype_name, FLOATS))
            raise CheckpointError(f"{name} is {dtype_name(header.dtype)}, expected one of {legal}")


def require_free_names(names: Iterable[str], layers: Container[str], format: Format) -> None:
    """Raise CheckpointError for a tensor of the source that readers of `format` would take for a part of one of the
    `layers` that are to be quantized, a fake quantizer's scale for one."""
    for name in names:
        stored = canonical_tensor(name)
        layer = stored
        while layer not in layers and "." in layer:
            layer = layer.rpartition(".")[0]
        suffix = stored.removeprefix(layer)
        if layer in layers and suffix != ".weight" and suffix.startswith(format.stems):
            raise CheckpointError(
                f"tensor {name!r} would be taken for a part of the quantized {layer}: take it out of the file, or keep "
                "the layer as it is"
            )


def _sizes(config: GPTNeoConfig) -> str:
    sizes = f"num_layers = {config.num_layers}, hidden_size = {config.hidden_size}, vocab_size = {config.vocab_size}"
    return f"config.json says {sizes}, intermediate_size = {config.inner_size}"
