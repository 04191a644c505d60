"""A tied head in a state dict: under two names, or, for what writes safetensors, under one.

safetensors holds no memory twice, and transformers' Trainer leaves second names out for its own classes only; of any
other model it writes `state_dict()` as it is. So a model that is being trained that way states each tensor once, and
loads what names it once. Everywhere else `state_dict()` has the keys that transformers' own has.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn


def share_names(model: nn.Module) -> None:
    """Have `state_dict` and `load_state_dict` of a model with `lm_head` and `transformer.wte` do so."""
    model.register_state_dict_post_hook(_leave_out_second_names)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_pre_hook(_fill_in_second_names)  # type: ignore[no-untyped-call]


def second_names(model: nn.Module) -> dict[str, str]:
    """Names of the head's tensors -> names of the embedding's, where these are the very same."""
    head, embedding = model.get_submodule("lm_head"), model.get_submodule("transformer.wte")
    weight = getattr(head, "weight", None)
    if weight is not None and weight is getattr(embedding, "weight", None):
        return {"lm_head.weight": "transformer.wte.weight"}
    if head is getattr(embedding, "table", None):  # a quantized table is the head itself
        return {f"lm_head.{name}": f"transformer.wte.table.{name}" for name in head.state_dict()}
    return {}


def _leave_out_second_names(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Where accelerate has prepared the model, as Trainer has it do; of several processes' it prepares a wrapper."""
    if getattr(model, "_is_accelerate_prepared", False) or (dist.is_available() and dist.is_initialized()):
        for name in second_names(model):
            state.pop(prefix + name, None)


def _fill_in_second_names(model: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    for second, first in second_names(model).items():
        if prefix + first in state:
            state.setdefault(prefix + second, state[prefix + first])
