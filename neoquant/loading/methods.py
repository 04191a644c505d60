"""Small methods of transformers' models that people call on a loaded one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from neoquant.errors import RequestError
from neoquant.model.attention import require_implementation, require_possible
from neoquant.model.base import Network
from neoquant.model.config import GPTNeoConfig
from neoquant.model.gpt_neo import CausalLM, Decoder, SelfAttention
from neoquant.nn.linear import QuantEmbedding, QuantLinear, StoredEmbedding, StoredLinear


class ModelMethods(Network):
    """Sizes, embeddings, and how the model computes and trains, by transformers' names."""

    config_class = GPTNeoConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    """What programs for any of transformers' models ask of a class."""
    _input_hook: RemovableHandle | None = None

    @property
    def vocab_size(self) -> int:
        """The configuration's."""
        return self.config.vocab_size

    @property
    def base_model(self) -> nn.Module:
        """The network without its head."""
        return self.get_submodule(self.base_model_prefix)

    @classmethod
    def can_generate(cls) -> bool:
        """Whether there is a language model's head."""
        return issubclass(cls, CausalLM)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Weights and biases, each once; a quantized weight counts as what it stands for, and is not trainable."""
        plain = {id(parameter): parameter for parameter in self.parameters()}
        layers = {layer for layer in self.modules() if isinstance(layer, QuantLinear)}
        if exclude_embeddings:
            for module in self.modules():
                if isinstance(module, nn.Embedding):
                    plain.pop(id(module.weight), None)
                if isinstance(module, QuantEmbedding):
                    layers.discard(module.table)
        if only_trainable:
            return sum(parameter.numel() for parameter in plain.values() if parameter.requires_grad)
        return sum(parameter.numel() for parameter in plain.values()) + sum(math.prod(each.shape) for each in layers)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of all weights as they are held; quantized ones are buffers."""
        buffers = self.buffers() if return_buffers else ()
        return sum(tensor.nbytes for tensor in (*self.parameters(), *buffers))

    def set_input_embeddings(self, embeddings: nn.Module) -> None:
        """Take another token embedding; a head that is tied to it is tied again by `tie_weights`."""
        self._decoder().add_module("wte", embeddings)

    def set_output_embeddings(self, head: nn.Module) -> None:
        """Take another language model's head. Raises RequestError where there is none."""
        if not self.can_generate():
            raise RequestError(f"{type(self).__name__} has no language model's head")
        self.add_module("lm_head", head)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Cut the token embedding, and a language model's head, to so many rows, or add rows; returns the embedding.

        New rows are the mean of the old ones (transformers draws from a billionth of their spread around it), or drawn
        as fresh weights are with `mean_resizing=False`. Raises RequestError for a quantized embedding.
        """
        embedding, head = self.get_input_embeddings(), self.get_output_embeddings()
        if not isinstance(embedding, nn.Embedding):
            raise RequestError("the embedding is quantized: dequantize() the model, or add tokens before quantizing")
        rows = embedding.num_embeddings if new_num_tokens is None else new_num_tokens
        if not isinstance(pad_to_multiple_of, int | None) or pad_to_multiple_of == 0:
            raise RequestError(f"pad_to_multiple_of is {pad_to_multiple_of!r}; legal is a number of rows, at least 1")
        if pad_to_multiple_of is not None:
            rows += -rows % pad_to_multiple_of
        if rows < 1:
            raise RequestError(f"new_num_tokens is {rows}; legal is at least 1")
        if rows != embedding.num_embeddings:
            std = None if mean_resizing else self.config.initializer_range
            tied = isinstance(head, nn.Linear) and head.weight is embedding.weight
            embedding.weight, embedding.num_embeddings = _resized(embedding.weight, rows, std), rows
            if isinstance(head, nn.Linear):
                head.weight = embedding.weight if tied else _resized(head.weight, rows, std)
                head.out_features = rows
            self.config.vocab_size = rows
        return embedding

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """While the model trains, compute each block again for its gradients instead of keeping what is inside it.

        `use_reentrant` is False whatever is said: torch's other way needs inputs that have gradients themselves.
        """
        others = set(gradient_checkpointing_kwargs or {}) - {"use_reentrant"}
        if others:
            raise RequestError(f"gradient_checkpointing_kwargs has {sorted(others)}; legal is use_reentrant")
        self._decoder().gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep what is inside the blocks again."""
        self._decoder().gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are computed again for their gradients."""
        return self._decoder().gradient_checkpointing

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """`gradient_checkpointing_enable` by its name in newer versions of transformers, whose Trainer calls it.

        Raises RequestError for some blocks only, or what they are given held elsewhere.
        """
        if every_n_layers != 1:
            raise RequestError(f"every_n_layers is {every_n_layers!r}; legal is 1: every block is computed again")
        if offload:
            raise RequestError(f"offload is {offload!r}; legal is False: what blocks are given stays on their device")
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs)

    def activation_checkpointing_disable(self) -> None:
        """Keep what is inside the blocks again."""
        self.gradient_checkpointing_disable()

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether blocks are computed again for their gradients."""
        return self.is_gradient_checkpointing

    def enable_input_require_grads(self) -> None:
        """Give what the embedding gives gradients, as adapters behind frozen weights need where blocks are computed
        again."""
        self.disable_input_require_grads()
        self._input_hook = self.get_input_embeddings().register_forward_hook(_require_grad)

    def disable_input_require_grads(self) -> None:
        """Take that back."""
        if self._input_hook is not None:
            self._input_hook.remove()
        self._input_hook = None

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Compute attention another way from now on. Raises RequestError for one that is not possible here."""
        require_implementation(attn_implementation)
        require_possible(attn_implementation, self.dtype, self.device)
        self.attn_implementation = self._decoder().attn_implementation = attn_implementation
        for module in self.modules():
            if isinstance(module, SelfAttention):
                module.set_implementation(attn_implementation)

    def dequantize(self) -> Self:
        """Put plain layers in the model's `dtype` in the place of the quantized ones; returns the model.

        `save_pretrained` then writes a plain model. Weights are what the quantized ones stand for.
        """
        dtype = self.dtype
        plain: dict[nn.Module, nn.Module] = {}
        for name, module in list(self.named_modules(remove_duplicate=False)):
            parent, _, last = name.rpartition(".")
            if not isinstance(module, QuantEmbedding | QuantLinear) or last == "table":
                continue
            if module not in plain:
                plain[module] = _plain(module, dtype)
            setattr(self.get_submodule(parent), last, plain[module])
        tie = getattr(self, "tie_weights", None)
        if tie is not None:
            tie()
        self.quantization_format = None
        return self

    def to_transformers(self) -> Any:
        """transformers' model of the same class name, sharing this one's tensors: see `neoquant.transformers`.

        Raises RequestError where transformers is not installed, or the model is spread over devices.
        """
        return transformers_room().to_transformers(self)

    def _decoder(self) -> Decoder:
        decoder = self.base_model
        assert isinstance(decoder, Decoder)
        return decoder


def transformers_room() -> Any:
    """The module that makes transformers' models. Raises RequestError where transformers is not installed."""
    try:  # by name: the room is made from models, and stands above them
        import_module("neoquant.transformers")
        return import_module("neoquant.transformers.to_transformers")
    except ModuleNotFoundError as error:
        raise RequestError("to_transformers needs the package transformers: pip install transformers") from error


def _resized(weight: Tensor, rows: int, std: float | None) -> nn.Parameter:
    """`weight[V, C]` with another number of rows; new ones are drawn, or (None) the mean."""
    old = weight.detach()
    new = old.new_empty(max(0, rows - len(old)), old.shape[1])
    if std is None:
        new[:] = old.float().mean(0)
    else:
        new.normal_(0.0, std)
    return nn.Parameter(torch.cat([old[:rows], new]), requires_grad=weight.requires_grad)


def _plain(module: QuantEmbedding | QuantLinear, dtype: torch.dtype) -> nn.Module:
    """The plain layer of the same numbers."""
    table = module.table if isinstance(module, QuantEmbedding) else module
    weight = nn.Parameter(table.quantized.dequantize(dtype))
    if isinstance(module, QuantEmbedding):
        return StoredEmbedding(weight, dtype)
    bias = None if module.bias is None else nn.Parameter(module.bias.detach().to(dtype))
    return StoredLinear(weight, bias)


def _require_grad(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.requires_grad_()
