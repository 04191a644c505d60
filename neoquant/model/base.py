"""What every network shares, whatever its head: its configuration, its device and type, initial weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from typing_extensions import Self

from neoquant.model.attention import require_implementation
from neoquant.model.config import GPTNeoConfig
from neoquant.model.outputs import ModelOutput

OutputT = TypeVar("OutputT", bound=ModelOutput)


@dataclass(frozen=True)
class LoadReport:
    """What a checkpoint and the model that was loaded from it did not have in common.

    missing      of the model's head, not in the checkpoint: newly initialized
    unexpected   in the checkpoint, not in the model: not used
    dropped      old mask buffers and the second name of a tied head, left out by name
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


class Network(nn.Module):
    """A GPT-Neo with one of its heads, or none; `base_model_prefix` is where its decoder stands ("": it is one)."""

    config: GPTNeoConfig
    load_report = LoadReport()
    """What was found when it was loaded from a checkpoint."""
    quantization_format: str | None = None
    """The format that its quantized layers were loaded from, which saving keeps; None where that is to be chosen."""
    name_or_path = ""
    """The folder or the id on the hub that it was loaded from: what PEFT notes as the base model of adapters."""
    hf_device_map: dict[str, int | str]
    """Where each part lies, by transformers' name; there is none while all of it is on one device."""
    base_model_prefix = "transformer"
    accepts_loss_kwargs = False

    def __init__(self, config: GPTNeoConfig, attn_implementation: str = "sdpa") -> None:
        super().__init__()
        require_implementation(attn_implementation)
        self.config = config
        self.attn_implementation = attn_implementation

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        embeddings: nn.Module = getattr(self, self.base_model_prefix or "", self).get_submodule("wte")
        return embeddings

    def get_output_embeddings(self) -> nn.Module | None:
        """The language model's head; None where the model has another, or none."""
        return getattr(self, "lm_head", None)

    def tied_weights(self) -> dict[str, str]:
        """Tensor name -> name of the tensor it shares storage with (and which is the one that is stored)."""
        return {}

    def output(self, output: OutputT, return_dict: bool | None) -> OutputT:
        """`output`, or a tuple of it where the caller, or (None) the configuration, wants no record."""
        named = self.config.return_dict if return_dict is None else return_dict
        return output if named else output.to_tuple()  # type: ignore[return-value]

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
        """Initialize the weights as GPT-Neo's are: normal(0, initializer_range), zero biases, unit norms.

        `seed=None` draws from torch's own generator; one seed gives other numbers on another kind of device. Weights on
        the meta device have no values, and stay as they are.
        """
        generators: dict[torch.device, torch.Generator] = {}
        for module in self.modules():
            if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                continue
            if isinstance(module, (nn.Linear, nn.Embedding)):
                device = module.weight.device
                if seed is not None and device not in generators:
                    generators[device] = torch.Generator(device).manual_seed(seed)
                with torch.no_grad():
                    module.weight.normal_(0.0, self.config.initializer_range, generator=generators.get(device))
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        return self

    def read_companions(self, folder: Path) -> list[str]:
        """Take what a model folder says beside config.json and the weights (here: nothing); remarks, a line each."""
        return []

    def companions(self) -> dict[str, str]:
        """Files to write beside config.json and the weights, by name (here: none)."""
        return {}
