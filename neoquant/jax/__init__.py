"""GPT-Neo in JAX: `pip install 'neoquant[jax]'`.

    from neoquant.jax import FlaxGPTNeoForCausalLM

    model = FlaxGPTNeoForCausalLM.from_pretrained("gpt-neo-1.3B-nf4")
    logits = model(input_ids, attention_mask).logits
    ids = model.generate(input_ids, max_new_tokens=20)

The folders are the same as everywhere in neoquant, quantized ones included. Quantized weights stay packed, in bytes,
and are decoded inside the compiled program, layer by layer.
"""

from __future__ import annotations

from importlib.util import find_spec

from neoquant.errors import RequestError

if missing := [name for name in ("jax", "flax") if find_spec(name) is None]:
    raise RequestError(
        f"neoquant.jax needs {' and '.join(missing)}: pip install 'neoquant[jax]' (in a clone '.[jax]'), "
        "on Python 3.11 or later"
    )

from neoquant.jax.cache import FlaxCache
from neoquant.jax.gpt_neo import FlaxGPTNeoForCausalLM, FlaxGPTNeoModel
from neoquant.jax.outputs import FlaxBaseModelOutput, FlaxCausalLMOutput

__all__ = ["FlaxBaseModelOutput", "FlaxCache", "FlaxCausalLMOutput", "FlaxGPTNeoForCausalLM", "FlaxGPTNeoModel"]
