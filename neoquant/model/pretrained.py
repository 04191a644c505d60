"""What every model class shares: its configuration, fresh weights, and the way to and from a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from neoquant.errors import RequestError
from neoquant.model.attention import ATTENTION_IMPLEMENTATIONS
from neoquant.model.config import GPTNeoConfig


@dataclass(frozen=True)
class LoadReport:
    """What a checkpoint and the model that was loaded from it did not have in common.

    fresh        of the model's head, not in the checkpoint: drawn at random
    unexpected   in the checkpoint, not in the model: not used
    dropped      old mask buffers and second names of a tensor, left out by name
    """

    fresh: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


class PreTrainedModel(nn.Module):
    """A GPT-Neo with one of its heads, or none.

    `base_model_prefix` is where the network stands in it ("" for the bare network), `load_report` what was found
    when it was loaded from a checkpoint.
    """

    config: GPTNeoConfig
    load_report = LoadReport()
    hf_device_map: dict[str, int | str]
    """Where each part lies, by transformers' name; there is none while all of it is on one device."""
    base_model_prefix = "transformer"

    def __init__(self, config: GPTNeoConfig, attn_implementation: str = "sdpa") -> None:
        super().__init__()
        if attn_implementation not in ATTENTION_IMPLEMENTATIONS:
            raise RequestError(
                f"attn_implementation is {attn_implementation!r}; legal are {', '.join(ATTENTION_IMPLEMENTATIONS)}"
            )
        self.config = config
        self.attn_implementation = attn_implementation

    def tied_weights(self) -> dict[str, str]:
        """Tensor name -> name of the tensor it shares storage with (and which is the one that is stored)."""
        return {}

    @property
    def device(self) -> torch.device:
        """Where the embeddings lie, and so where token ids belong."""
        return self._embeddings().device

    @property
    def dtype(self) -> torch.dtype:
        """The type activations are computed in."""
        return self._embeddings().dtype

    def _embeddings(self) -> torch.Tensor:
        """The position embeddings: never quantized, so that their type is the activations' type."""
        for name, parameter in self.named_parameters():
            if name.endswith("wpe.weight"):
                return parameter
        raise AssertionError("every model has position embeddings")

    def init_weights(self, seed: int | None = None) -> Self:
        """Draw fresh weights: normal(0, initializer_range), zero biases, unit norms, as GPT-Neo was begun."""
        generator = torch.Generator().manual_seed(seed) if seed is not None else None
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                with torch.no_grad():
                    module.weight.normal_(0.0, self.config.initializer_range, generator=generator)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        return self

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        attn_implementation: str = "sdpa",
        quantization_config: Any = None,
    ) -> Self:
        """Load a checkpoint, plain or quantized, from a folder or by its id on the hub.

        `dtype` is the type activations are computed in: a torch type, its name, `"auto"` (the checkpoint's own) or
        None (float32 on a CPU, float16 on a GPU). `device_map` is a device, `"auto"`, or a mapping of parts of the
        model to devices or `"disk"`; `max_memory` says what `"auto"` may take of each (0 or "cpu" -> "2GB"). With
        `quantization_config`, a BitsAndBytesConfig or GPTQConfig (neoquant's or transformers'), their values or a
        Recipe, a plain checkpoint is quantized on the way.

        Raises CheckpointError, HubError or RequestError; a tensor that is missing or unexpected is one of the first.
        """
        # Imports upwards: a checkpoint may hold quantized weights, or become so, of which this package knows nothing.
        options: dict[str, Any] = {
            "dtype": dtype, "device": device_map, "max_memory": max_memory, "attn_implementation": attn_implementation
        }  # fmt: skip
        if quantization_config is not None:
            from neoquant.onload import load_quantized

            return load_quantized(source, cls, quantization_config, revision=revision, **options)
        from neoquant.loading import load_model

        return load_model(source, cls, revision=revision, **options)

    def save_pretrained(self, folder: str | Path, *, force: bool = False) -> None:
        """Write a folder that transformers and neoquant read; `force` replaces one that is there."""
        from neoquant.loading import save_model

        save_model(self, folder, force=force)
