"""Adapters of PEFT on a quantized model: small matrices beside the quantized weights are trained, and those are not.

The way of QLoRA (Dettmers et al., 2023): the loss's gradient passes through the quantized layers to the adapters in
front of them. PEFT is an extra, `pip install neoquant[peft]`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neoquant.errors import RequestError
from neoquant.model.base import Network
from neoquant.model.names import TASK_HEADS
from neoquant.nn.linear import QuantLinear


def get_peft_model(model: Network, peft_config: Any) -> Any:
    """PEFT's function of that name, for quantized layers as well.

    Args:
        model: changed in place; everything in it is frozen, but for the head that the configuration's `task_type` is
            about ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"), unless its `modules_to_save` says otherwise.
        peft_config: a `peft.LoraConfig`, whose `target_modules` may name quantized layers ("q_proj", "c_fc", ...).

    Returns: a `peft.PeftModel`. `save_pretrained` on it writes the adapters alone.

    Raises RequestError where PEFT is not installed, or for another kind of adapter.
    """
    peft = _peft()
    if not isinstance(peft_config, peft.LoraConfig):
        raise RequestError(f"peft_config is of type {type(peft_config).__name__}; legal is a peft.LoraConfig")
    task = getattr(peft_config.task_type, "value", peft_config.task_type)
    if task in TASK_HEADS and peft_config.modules_to_save is None:
        peft_config.modules_to_save = [TASK_HEADS[task]]
    peft_config._register_custom_module({QuantLinear: _layer_class()})
    # PEFT's own classes for a task expect more of transformers' models than ours have; this one only passes on.
    return peft.PeftModel(model, peft_config)


def load_peft_model(model: Network, folder: str | Path, *, is_trainable: bool = False) -> Any:
    """`model`, changed in place, with the adapters that were saved in `folder`; frozen unless `is_trainable`."""
    config = _peft().LoraConfig.from_pretrained(str(folder))
    config.inference_mode = not is_trainable
    adapted = get_peft_model(model, config)
    adapted.load_adapter(str(folder), "default", is_trainable=is_trainable)
    return adapted if is_trainable else adapted.eval()


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise RequestError(
            "adapters need the package peft, which is not installed: pip install neoquant[peft]"
        ) from None
    return peft


def _layer_class() -> type[Any]:
    """PEFT's layer for linear ones, which needs little to stand beside a quantized one."""
    from peft.tuners.lora.layer import Linear

    class LoraQuantLinear(Linear):  # type: ignore[misc]  # PEFT is not installed where types are checked
        """Adapters beside a quantized layer."""

        def _get_in_out_features(self, module: QuantLinear) -> tuple[int, int]:
            return module.in_features, module.out_features

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """Not possible: the sum would have to be rounded again."""
            raise RequestError("adapters cannot be merged into quantized weights: merge them into the plain model")

    return LoraQuantLinear
