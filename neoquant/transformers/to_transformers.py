"""From a loaded model of neoquant's to transformers' of the same class name."""

from __future__ import annotations

import copy
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import transformers
from torch import nn
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

from neoquant.errors import RequestError
from neoquant.formats.base import dtype_name
from neoquant.loading.save import choose_format
from neoquant.model.base import Network
from neoquant.transformers.graft import graft
from neoquant.transformers.quantizer import NeoquantConfig, NeoquantQuantizer

_KEPT: WeakKeyDictionary[Network, tuple[list[Any], Any]] = WeakKeyDictionary()
"""network -> what its model was made of, and the model."""


def kept(network: Network) -> Any:
    """`to_transformers(network)`, or the model that it gave before where it would be made of the same again.

    For calls that leave the model as it is: it is kept until the network goes. Raises what `to_transformers` does.
    """
    made_of = _made_of(network)
    former, model = _KEPT.get(network, (None, None))
    if former != made_of:
        model = to_transformers(network)
        _KEPT[network] = made_of, model
    _set_mode(network, model)
    return model


def _made_of(network: Network) -> list[Any]:
    """All that the model depends on but values of shared tensors, to be compared.

    Where modules, tensors, kernels or the configuration were replaced, cast or moved, it differs. The model shares the
    tensors, so that none of their addresses is given to others while it is kept.
    """
    modules = [
        (name, ref(module), getattr(module, "kernel", None), getattr(module, "compute_dtype", None))
        for name, module in network.named_modules(remove_duplicate=False)
    ]
    tensors = [
        (name, id(tensor), tensor.data_ptr(), tensor.device, tensor.dtype)
        for named in (network.named_parameters, network.named_buffers)
        for name, tensor in named(remove_duplicate=False)
    ]
    return [network.config.to_dict(), choose_format(network), hasattr(network, "hf_device_map"), modules, tensors]


def to_transformers(network: Network) -> Any:
    """`network` as transformers' model of the same class name, in the same mode, sharing its tensors.

    What is trained in one is trained in the other; layers that are replaced in one (by adapters, say) are its own.

    Raises RequestError for a class that transformers does not have, or parts on several devices.
    """
    cls = getattr(transformers, type(network).__name__, None)
    if cls is None:
        raise RequestError(
            f"transformers has no class {type(network).__name__!r}; it has those of neoquant's own names"
        )
    if hasattr(network, "hf_device_map"):
        raise RequestError("the model is spread over devices: load it with transformers and a device_map instead")
    values = network.config.to_dict() | {"dtype": dtype_name(network.dtype)}
    values.pop("quantization_config", None)
    config = transformers.GPTNeoConfig.from_dict(values)
    with torch.random.fork_rng(devices=()):  # weights that are never looked at are drawn
        with torch.device("meta"):
            model = cls(config)
        _give_masks(model, config, network.device)
    graft(network, model, getattr(model, "all_tied_weights_keys", {}))
    _tell_of_quantization(network, model)
    _set_mode(network, model)
    return model


def _set_mode(network: Network, model: Any) -> None:
    """How it generates, and whether it trains."""
    asked: Any = getattr(network, "generation_config", None)
    if asked is not None:
        model.generation_config = transformers.GenerationConfig(**asked.to_dict())
    model.train(network.training)


def _give_masks(model: Any, config: Any, device: torch.device) -> None:
    """The buffers that attention is made with, which are the same for all layers of a kind."""
    narrow = copy.deepcopy(config)
    narrow.hidden_size = config.num_heads  # only linear layers depend on it
    made: dict[str, nn.Module] = {}
    for block in model.base_model.h:
        kind = block.attn.attention_type
        if kind not in made:
            made[kind] = GPTNeoSelfAttention(narrow, kind, 0).to(device)
        for name, buffer in made[kind].named_buffers(recurse=False):
            block.attn.attention._buffers[name] = buffer


def _tell_of_quantization(network: Network, model: Any) -> None:
    """What transformers looks at when it saves a quantized model, or trains adapters on it."""
    chosen = choose_format(network)
    if chosen is None:
        return
    format, stated = chosen
    quantizer = NeoquantQuantizer(NeoquantConfig(stored=stated))
    quantizer.format = format
    model.hf_quantizer = quantizer
    model.is_quantized, model.quantization_method = True, quantizer.quantization_config.quant_method
    model.config.quantization_config = quantizer.quantization_config
