"""A model's passes over a text that grows, each with its keys and values held."""

from __future__ import annotations

from torch import Tensor

from neoquant.model.cache import KVCache
from neoquant.model.gpt_neo import CausalLM


class Passes:
    """The passes of one text, or of several together, directly where the model offers that (`CausalLM.direct_pass`).

    With `steady`, nobody changes the model while they last: what they rest on is looked at once.
    """

    def __init__(self, model: CausalLM, steady: bool = False) -> None:
        self._model, self.device = model, model.device
        direct = model.direct_pass if self.device.type == "cpu" else None
        self._direct = None if direct is None else direct(model, steady)

    def logits(
        self,
        ids: Tensor,
        cache: KVCache,
        last: int = 1,
        *,
        positions: Tensor | None = None,
        keep: Tensor | None = None,
        types: Tensor | None = None,
    ) -> Tensor:
        """Behind the last of ids[B, T], which follow what `cache` holds, `[B, last, V]`.

        `positions` and `types` int64[B, T] are Decoder's `position_ids` and `token_type_ids`; `keep` bool[B, S], S
        counting the new positions too, is False on padding.
        """
        if self._direct is not None and types is None:
            found = self._direct.logits(ids, cache, last, positions, keep)
            if found is not None:
                return found
        output = self._model(
            ids,
            keep,
            position_ids=positions,
            token_type_ids=types,
            past_key_values=cache,
            output_attentions=False,
            output_hidden_states=False,
            return_dict=True,
            logits_to_keep=last,
        )
        logits: Tensor = output.logits
        return logits
