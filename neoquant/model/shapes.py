"""The tensors of a GPT-Neo and their shapes, as config.json promises them."""

from __future__ import annotations

from collections.abc import Mapping

from neoquant.model.config import GPTNeoConfig
from neoquant.model.names import BASE_PREFIX, EMBEDDING, TIED_HEAD

Shape = tuple[int, ...]


def network_shapes(config: GPTNeoConfig) -> dict[str, Shape]:
    """Name -> shape of every parameter of the network without a head, by the names in a causal language model."""
    hidden = config.hidden_size
    shapes: dict[str, Shape] = {
        EMBEDDING: (config.vocab_size, hidden),
        f"{BASE_PREFIX}wpe.weight": (config.max_position_embeddings, hidden),
    }
    for block in range(config.num_layers):
        shapes |= {f"{BASE_PREFIX}h.{block}.{name}": shape for name, shape in block_shapes(config).items()}
    return shapes | {f"{BASE_PREFIX}ln_f.weight": (hidden,), f"{BASE_PREFIX}ln_f.bias": (hidden,)}


def block_shapes(config: GPTNeoConfig) -> dict[str, Shape]:
    """Name in the block -> shape of every parameter of a block."""
    hidden, inner = config.hidden_size, config.inner_size
    attention = {
        f"attn.attention.{name}.weight": (hidden, hidden) for name in ("q_proj", "k_proj", "v_proj", "out_proj")
    }
    norms = {f"{norm}.{name}": (hidden,) for norm in ("ln_1", "ln_2") for name in ("weight", "bias")}
    return {
        **norms,
        **attention,
        "attn.attention.out_proj.bias": (hidden,),
        "mlp.c_fc.weight": (inner, hidden),
        "mlp.c_fc.bias": (inner,),
        "mlp.c_proj.weight": (hidden, inner),
        "mlp.c_proj.bias": (hidden,),
    }


def head_shapes(config: GPTNeoConfig) -> dict[str, Shape]:
    """Name -> shape of the language model's head, where it is not the token embedding."""
    return {} if config.tie_word_embeddings else {TIED_HEAD: (config.vocab_size, config.hidden_size)}


def shape_problem(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> str | None:
    """The first tensor that has another shape than the one expected, in a line; None where all that is there fits."""
    for name, shape in expected.items():
        if name in found and found[name] != shape:
            if 0 in found[name]:
                return (
                    f"tensor {name!r} is {list(found[name])}: DeepSpeed ZeRO-3 leaves such placeholders where it saves "
                    "without gathering; its zero_to_fp32.py makes whole weights of the checkpoint folder"
                )
            return f"tensor {name!r} is {list(found[name])}, but config.json says {list(shape)}"
    return None
