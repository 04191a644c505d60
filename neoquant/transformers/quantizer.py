"""The quantizer that transformers calls while it loads: it takes the weights out of transformers' hands.

transformers builds the model and everything around it; neoquant reads the checkpoint as for itself (`loading`), every
format, device and refusal included, and gives the layers over. Written against the hooks that transformers 4.57 and
5 have in common.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from neoquant import formats
from neoquant.checkpoint import open_checkpoint
from neoquant.errors import RequestError
from neoquant.formats import Format
from neoquant.loading.contents import Readable
from neoquant.loading.fill import LoadWarning
from neoquant.loading.load import read_model
from neoquant.loading.quantize_on_load import quantized_view
from neoquant.loading.save import tensors_of
from neoquant.model.base import Network
from neoquant.model.gpt_neo import CausalLM, Decoder
from neoquant.transformers.graft import HEAD, graft, vacate
from neoquant.transformers.layers import plain_layer

METHOD = "neoquant"
_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
_IGNORED = (r"^(transformer\.)?(wte|wpe|ln_f|h)\.", rf"^{HEAD}\.")  # of a checkpoint: what neoquant has read


class NeoquantConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers need not be there
    """`quantization_config=` of transformers' `from_pretrained`, and what its config.json then says.

    quantization   how a plain checkpoint is to be quantized: a recipe or its name, neoquant's or transformers'
                   BitsAndBytesConfig, neoquant's GPTQConfig, or their values; None for one that is quantized already
    stored         what config.json says of the quantized layers, written as it was read
    """

    quant_method: ClassVar[str] = METHOD

    def __init__(self, quantization: Any = None, *, stored: dict[str, Any] | None = None) -> None:
        self.quantization, self.stored = quantization, stored

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """What a checkpoint's config.json says."""
        config = cls(stored=dict(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """What config.json says."""
        return {"quant_method": METHOD} if self.stored is None else dict(self.stored)


class NeoquantQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads and saves GPT-Neo in neoquant's formats, inside transformers."""

    requires_calibration = False
    is_trainable = True
    """Gradients pass through quantized layers to adapters in front of them."""

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        if not isinstance(quantization_config, NeoquantConfig):
            quantization_config = NeoquantConfig(quantization_config)
        super().__init__(quantization_config, **options)
        self.format: Format | None = None
        self._source: tuple[str | Path, str | None] = ("", None)
        self._device_map: Any = None
        self._dtype = torch.float32
        self._tied: dict[str, str] = {}

    def validate_environment(self, *args: Any, device_map: Any = None, **options: Any) -> None:
        """Raises RequestError for a device map that leaves parts on disk."""
        places = list(device_map.values()) if isinstance(device_map, dict) else [device_map]
        if "disk" in places:
            raise RequestError(
                "device_map leaves parts on disk, but quantized weights are held in memory, as kernels want them: "
                "legal are devices"
            )

    def update_device_map(self, device_map: Any) -> Any:
        """A GPT-Neo that is quantized fits on one device: "auto" is the first GPU, or the CPU where there is none."""
        if isinstance(device_map, str) and device_map in _SPREAD:
            device_map = {"": torch.cuda.current_device()} if torch.cuda.is_available() else None
        self._device_map = device_map
        return device_map

    def update_attn_implementation(self, config: Any) -> Any:
        """Called before a type is chosen: on a CPU the default is float32, as everywhere in neoquant."""
        if self._is_on_cpu():
            config.dtype = torch.float32
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **options: Any
    ) -> None:
        if checkpoint_files:
            self._source = Path(checkpoint_files[0]).parent, None
        else:
            self._source = model.config.name_or_path, getattr(model.config, "_commit_hash", None)
        self._dtype = next(parameter.dtype for parameter in model.parameters())
        self._tied = vacate(model)
        ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), *_IGNORED]
        is_old = transformers.__version__.startswith("4.")
        model._keys_to_ignore_on_load_unexpected = ignored if is_old else set(ignored)

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        del model._keys_to_ignore_on_load_unexpected
        graft(self._read(CausalLM if hasattr(model, HEAD) else Decoder), model, self._tied)
        model.config.quantization_config = self.quantization_config
        return model

    def _read(self, cls: type[Network]) -> Network:
        source, revision = self._source
        device = {"": "cpu"} if self._device_map is None else self._device_map
        with open_checkpoint(source, revision=revision) as checkpoint, warnings.catch_warnings():
            # A task's head is transformers' own to load, and to speak of.
            warnings.filterwarnings("ignore", ".* also holds .* does not use", LoadWarning)
            view: Readable = checkpoint
            compute_dtype = None
            if not self.pre_quantized:
                view, compute_dtype = quantized_view(checkpoint, self.quantization_config.quantization)
            self.format, _ = formats.detect_checked(view.config, view.headers, view.view)
            self.quantization_config.stored = view.config.get("quantization_config")
            return read_model(view, cls, dtype=self._dtype, device=device, compute_dtype=compute_dtype)

    def get_state_dict_and_metadata(
        self, model: Any, safe_serialization: bool = True
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What is saved: every quantized layer in the format that it was loaded from, bit for bit."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        assert self.format is not None
        return tensors_of(model, _tied_names(model), self.format), {}

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """Yes, in every format."""
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """Plain layers that hold the quantized ones' values, all in one type (None: what activations are computed in);
        the head is tied as config.json says."""
        computed: torch.dtype = model.base_model.wpe.weight.dtype  # an embedding of tokens may be held in another
        kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype or computed
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if (plain := plain_layer(module, kind)) is not None and not name.endswith(".table"):
                model.set_submodule(name, plain)
        nn.Module.to(model, kind)
        for name in ("_tied_weights_keys", "tie_weights"):
            model.__dict__.pop(name, None)  # what stood in for the class's own
        model.tie_weights()
        return model

    def _is_on_cpu(self) -> bool:
        places = self._device_map.values() if isinstance(self._device_map, dict) else [self._device_map]
        return all(place is None or torch.device(place).type == "cpu" for place in places)


def _tied_names(model: Any) -> list[str]:
    """The head's weight, where it is the embedding's."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    shared = head is not None and getattr(head, "weight", head) is getattr(embedding, "weight", None)
    return [f"{HEAD}.weight"] if shared else []
