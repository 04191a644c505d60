"""What a checkpoint may be converted into, and what stands against it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from neoquant.checkpoint import Checkpoint
from neoquant.errors import RequestError
from neoquant.formats import NAMED, Format
from neoquant.formats.gptq import V1, V2
from neoquant.model.names import TABLES
from neoquant.tensor import QuantizedTensor

PLAIN = "safetensors"
"""What a checkpoint without quantized weights is called as a target."""

TARGETS: Mapping[str, tuple[Format, ...]] = {name: NAMED[name] for name in NAMED if name != "auto"} | {PLAIN: ()}
"""Target -> formats to try, in this order: the first that holds the first layer."""


def refuse_layer(format: Format, name: str, q: QuantizedTensor) -> str | None:
    """Why a layer cannot be spelled exactly in this format, or None."""
    if name in TABLES and not format.holds_embeddings:
        return f"format {format.name} keeps embeddings in half precision, and this one is {q.grid.name}"
    return format.refuse_tensor(q)


def require_sense(
    checkpoint: Checkpoint, found: Format | None, to: str | None, dequantize: bool, dtype: torch.dtype | str | None
) -> None:
    """Refuse what contradicts itself or the checkpoint."""
    if dequantize and to not in (None, PLAIN):
        raise RequestError(f"dequantize gives plain weights, which {to} does not hold: ask for one of the two")
    if not dequantize and to is None:
        raise RequestError(f"nothing is asked for: --to names a format ({', '.join(TARGETS)}), or give --dequantize")
    if found is None and dequantize:
        raise RequestError(f"{checkpoint.source} is not quantized; --to {PLAIN} writes it anew")
    if found is None and to != PLAIN:
        raise RequestError(f"{checkpoint.source} is not quantized: `neoquant quantize` makes a quantized model of it")
    if found is not None and to == PLAIN and not dequantize:
        raise RequestError(
            f"{checkpoint.source} is quantized (format {found.name}); --dequantize gives up the packing, "
            f"or name another format: {', '.join(key for key in TARGETS if key != PLAIN)}"
        )
    if dtype is not None and to != PLAIN and not dequantize:
        raise RequestError(f"dtype is for plain weights; what is kept beside {to} stays as it is stored")


def target_name(target: Format | None) -> str:
    if target is None:
        return PLAIN
    return {V1: "gptq-v1", V2: "gptq-v2"}.get(getattr(target, "version", None) or "", target.name)
