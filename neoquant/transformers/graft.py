"""A network of neoquant's as transformers' model of the same name, whose modules get the network's own tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from neoquant.errors import CheckpointError
from neoquant.model.base import Network
from neoquant.model.names import BASE_PREFIX
from neoquant.model.shapes import shape_problem
from neoquant.nn.linear import QuantEmbedding, QuantLinear, StoredEmbedding, StoredLinear
from neoquant.transformers.block import use_fused_blocks
from neoquant.transformers.layers import TransformersEmbedding, TransformersLinear

HEAD = "lm_head"


def vacate(model: Any) -> dict[str, str]:
    """Take the parameters out of a transformers model, but for a task's own head, so that nothing is loaded into them.

    Returns what it tied, which `graft` is to be given.
    """
    module: Any
    for module in _of_the_network(model):
        for name in module._parameters:
            module._parameters[name] = None
        if module._buffers == {}:  # transformers draws what is not there, and attention's masks must be made
            module._is_hf_initialized = True
    tied, model.all_tied_weights_keys = getattr(model, "all_tied_weights_keys", None), {}
    return tied or {}


def graft(network: Network, model: Any, tied: dict[str, str]) -> None:
    """Give a vacated transformers model the tensors of `network`, a decoder or a language model.

    Raises CheckpointError where their shapes differ.
    """
    prefix = BASE_PREFIX if not network.base_model_prefix and model.base_model is not model else ""
    twins: dict[nn.Module, nn.Module] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        if isinstance(module, QuantEmbedding | QuantLinear | StoredEmbedding | StoredLinear):
            if not name.endswith(".table"):
                _replace(model, prefix + name, _twin(module, twins, network.dtype))
        elif module._parameters:
            _share(model.get_submodule(prefix + name), prefix + name, module)
    use_fused_blocks(model)
    if isinstance(model.get_input_embeddings(), QuantEmbedding):
        model._tied_weights_keys = type(model._tied_weights_keys or {})()
        model.tie_weights = KeepTied(model)
    else:
        model.all_tied_weights_keys = tied


class KeepTied:
    """A model's `tie_weights` where its embedding is quantized: the head is the embedding's table, which has none."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.is_tied = self._head() is model.get_input_embeddings().table

    def __call__(self, *args: Any, **options: Any) -> None:
        if self.is_tied:
            self.model.set_output_embeddings(self.model.get_input_embeddings().table)

    def _head(self) -> nn.Module | None:
        return self.model.get_output_embeddings()  # type: ignore[no-any-return]


def _of_the_network(model: Any) -> list[nn.Module]:
    """The modules of a transformers model that are the network's, and the language model's head."""
    return [*model.base_model.modules(), *(getattr(model, name) for name in (HEAD,) if hasattr(model, name))]


def _twin(
    module: QuantEmbedding | QuantLinear | StoredEmbedding | StoredLinear,
    twins: dict[nn.Module, nn.Module],
    computed: torch.dtype,
) -> nn.Module:
    """A layer of transformers' kind with the same tensors; the same one for the same."""
    if module not in twins:
        if isinstance(module, QuantEmbedding):
            twin = TransformersEmbedding(module)
            twins[module.table] = twin.table
            twins[module] = twin
        elif isinstance(module, StoredEmbedding):
            twins[module] = StoredEmbedding(module.get_parameter("weight"), module.get_buffer("like").dtype)
        elif isinstance(module, StoredLinear):
            twins[module] = StoredLinear(module.get_parameter("weight"), module._parameters.get("bias"))
        else:
            twins[module] = TransformersLinear(module, computed)
    return twins[module]


def _replace(model: Any, name: str, module: nn.Module) -> None:
    """Put a layer in the place of another, whose hook of accelerate (it moves inputs to a device) it takes on."""
    former = model.get_submodule(name)
    _require_shape(name, _shape(former), _shape(module))
    module.train(former.training)
    module._is_hf_initialized = True  # type: ignore[assignment]
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
    if hasattr(former, "_hf_hook"):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(module, former._hf_hook)


def _share(module: nn.Module, name: str, source: nn.Module) -> None:
    """Give a module of the same kind the parameters of another."""
    _require_shape(name, _shape(module), _shape(source))
    for last, parameter in source._parameters.items():
        module._parameters[last] = parameter


def _shape(module: Any) -> tuple[int, ...]:
    """What a layer was made for, whether or not it has a weight."""
    if hasattr(module, "normalized_shape"):
        return tuple(module.normalized_shape)
    if hasattr(module, "num_embeddings"):
        return module.num_embeddings, module.embedding_dim
    return module.out_features, module.in_features


def _require_shape(name: str, wanted: tuple[int, ...], found: tuple[int, ...]) -> None:
    if problem := shape_problem({name: found}, {name: wanted}):
        raise CheckpointError(problem)
