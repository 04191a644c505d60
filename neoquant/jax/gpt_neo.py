"""GPT-Neo in JAX, to be read beside `neoquant.model.gpt_neo`, whose logits it gives.

The same two things set attention apart: scores are **not** divided by the root of the head size, and are computed in
float32; a local layer sees the last `window_size` positions. Shapes: B batch, T new positions, S all positions that a
cache has room for, H heads, D head size, C hidden size, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from typing_extensions import Self

from neoquant.errors import ContextError, RequestError
from neoquant.jax.cache import FlaxCache
from neoquant.jax.checks import require_within
from neoquant.jax.generate import generate
from neoquant.jax.outputs import FlaxBaseModelOutput, FlaxCausalLMOutput
from neoquant.jax.source import TorchSource
from neoquant.jax.weights import PRECISION
from neoquant.loading.pretrained import GPTNeoForCausalLM, GPTNeoModel, PreTrainedModel
from neoquant.model.config import GPTNeoConfig
from neoquant.sizes import plural

_tanh_gelu = partial(jax.nn.gelu, approximate=True)
ACTIVATION: dict[str, Callable[[Any], Any]] = {
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


class FlaxSelfAttention(nnx.Module):
    """Multi-head attention of one layer, global or local."""

    def __init__(self, config: GPTNeoConfig, source: TorchSource, layer: int, dtype: Any) -> None:
        name = f"h.{layer}.attn.attention"
        self.window = config.window_size if config.attention_layers[layer] == "local" else None
        self.heads = config.num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            source.linear(f"{name}.{part}_proj", dtype) for part in ("q", "k", "v", "out")
        )

    def __call__(self, x: Any, keep: Any | None, cached: tuple[Any, Any] | None, past: Any) -> tuple[Any, Any]:
        """Of x[B, T, C]: the layer's output, and keys and values of all positions, [B, H, S, D] each."""
        query, key, value = (self._split(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if cached is not None:
            key, value = (
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), past, axis=2)
                for old, new in zip(cached, (key, value), strict=True)
            )
        wide = (query.astype(jnp.float32), key.astype(jnp.float32))
        scores = jnp.einsum("bhtd,bhsd->bhts", *wide, precision=PRECISION)
        mask = attention_mask(x.shape[1], key.shape[2], past, self.window, keep)
        weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1).astype(value.dtype)
        y = jnp.einsum("bhts,bhsd->bthd", weights, value, precision=PRECISION)
        return self.out_proj(y.reshape(x.shape)), (key, value)

    def _split(self, x: Any) -> Any:
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(0, 2, 1, 3)  # [B, T, C] -> [B, H, T, D]


def attention_mask(T: int, S: int, past: Any, window: int | None, keep: Any | None) -> Any:
    """Which of S positions each of T, from `past` on, may look at: bool [1 or B, 1, T, S].

    A query that would see nothing (padding on the left) sees itself: its output is never used, but must be finite.
    """
    i, j = past + jnp.arange(T)[:, None], jnp.arange(S)[None]
    mask = j <= i
    if window is not None:
        mask &= i - j < window
    if keep is None:
        return mask[None, None]
    mask = mask & keep[:, None, None, :]
    return mask | (~mask.any(-1, keepdims=True) & (i == j))


class FlaxBlock(nnx.Module):
    """One layer: attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: GPTNeoConfig, source: TorchSource, layer: int, dtype: Any) -> None:
        eps = config.layer_norm_epsilon
        self.ln_1, self.ln_2 = (source.norm(f"h.{layer}.{name}", eps, dtype) for name in ("ln_1", "ln_2"))
        self.attn = FlaxSelfAttention(config, source, layer, dtype)
        self.c_fc, self.c_proj = (source.linear(f"h.{layer}.mlp.{name}", dtype) for name in ("c_fc", "c_proj"))
        self.activation = config.activation_function

    def __call__(self, x: Any, keep: Any | None, cached: tuple[Any, Any] | None, past: Any) -> tuple[Any, Any]:
        attended, held = self.attn(self.ln_1(x), keep, cached, past)
        x = x + attended
        return x + self.c_proj(ACTIVATION[self.activation](self.c_fc(self.ln_2(x)))), held


class _Hashable:
    """A configuration as part of what a program is compiled for: two that say the same are the same."""

    def __init__(self, config: GPTNeoConfig) -> None:
        self.config = config
        self._text = json.dumps(config.to_dict(), sort_keys=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashable) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


class _PreTrained(nnx.Module):
    """What both models share: where they come from, their programs, and what may be asked of them."""

    torch_class: ClassVar[type[PreTrainedModel]]

    def __init__(self, config: GPTNeoConfig, source: TorchSource, dtype: Any) -> None:
        """From a source of weights: `from_pretrained` opens one."""
        self._config = _Hashable(config)

    @property
    def config(self) -> GPTNeoConfig:
        return self._config.config

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None, dtype: Any = jnp.float32) -> Self:
        """Load a checkpoint, plain or quantized, from a folder or by its id on the hub.

        `dtype` is what activations are computed in and plain weights are held in: float32, float16 or bfloat16, as a
        JAX type or by name. Quantized weights stay packed. Arrays lie on JAX's default device.

        Raises what `neoquant.load` raises.
        """
        kind = _float_type(dtype)
        taken = TorchSource.open(source, cls.torch_class, revision)
        return cls(taken.config, taken, kind)

    @property
    def dtype(self) -> Any:
        """The type activations are computed in."""
        return self._base().wpe[...].dtype

    def _base(self) -> FlaxGPTNeoModel:
        raise NotImplementedError

    def init_cache(self, batch_size: int, max_length: int) -> FlaxCache:
        """An empty cache for so many rows and positions. Raises ContextError beyond the model's own."""
        config = self.config
        if max_length > config.max_position_embeddings:
            raise ContextError(f"{plural(max_length, 'position')}; this model has {config.max_position_embeddings}")
        shape = (batch_size, config.num_heads, max_length, config.hidden_size // config.num_heads)
        empty = tuple(jnp.zeros(shape, self.dtype) for _ in range(config.num_layers))
        return FlaxCache(empty, empty, 0)

    def _call(
        self,
        input_ids: Any,
        attention_mask: Any | None,
        position_ids: Any | None,
        past_key_values: FlaxCache | None,
        output_hidden_states: bool,
    ) -> Any:
        """Check what can be, then run the compiled program."""
        ids = jnp.asarray(input_ids, jnp.int32)
        past = 0 if past_key_values is None else past_key_values.length
        total = past + ids.shape[1]
        room = ids.shape[1] if past_key_values is None else past_key_values.capacity
        if not isinstance(total, jax.core.Tracer):
            limit = self.config.max_position_embeddings
            if position_ids is None and int(total) > limit:
                raise ContextError(f"{plural(int(total), 'position')}; this model has {limit}")
            if int(total) > room:
                raise ContextError(f"{plural(int(total), 'position')}; this cache has room for {room}")
        if position_ids is not None:
            require_within("position_ids", position_ids, self.config.max_position_embeddings)
        keep = None
        if attention_mask is not None:
            keep = jnp.asarray(attention_mask).astype(bool)
            if keep.shape[1] not in (room, int(total)):
                raise RequestError(f"attention_mask covers {keep.shape[1]} positions; there are {int(total)}")
            keep = jnp.pad(keep, ((0, 0), (0, room - keep.shape[1])))  # behind the newest, which nothing sees
            seen = jax.lax.dynamic_slice_in_dim(keep, past, ids.shape[1], axis=1)
            ids = jnp.where(seen, ids, 0)  # padding may have an id that no token has
        require_within("input_ids", ids, self.config.vocab_size)
        graph, state = nnx.split(self)
        return _run(graph, state, ids, keep, position_ids, past_key_values, output_hidden_states)


class FlaxGPTNeoModel(_PreTrained):
    """The network without a head: token ids to hidden states."""

    torch_class: ClassVar[type[PreTrainedModel]] = GPTNeoModel

    def __init__(self, config: GPTNeoConfig, source: TorchSource, dtype: Any) -> None:
        super().__init__(config, source, dtype)
        self.wte = source.weight("wte", dtype)
        self.wpe = source.table("wpe", dtype)
        self.h = nnx.List([FlaxBlock(config, source, layer, dtype) for layer in range(config.num_layers)])
        self.ln_f = source.norm("ln_f", config.layer_norm_epsilon, dtype)

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any | None = None,
        position_ids: Any | None = None,
        *,
        past_key_values: FlaxCache | None = None,
        output_hidden_states: bool = False,
    ) -> FlaxBaseModelOutput:
        """Hidden states of `input_ids[B, T]`.

        `attention_mask[B, S]` is 0 on padding, which belongs on the right: positions are absolute. With a cache, from
        `init_cache` or an earlier output, the T ids follow the positions it holds.

        Raises ContextError beyond the model's positions or the cache's room, RequestError for ids outside the
        vocabulary; inside somebody else's jit neither can be seen.
        """
        output: FlaxBaseModelOutput = self._call(
            input_ids, attention_mask, position_ids, past_key_values, output_hidden_states
        )
        return output

    def forward(
        self, ids: Any, keep: Any | None, positions: Any | None, cache: FlaxCache | None, hidden: bool
    ) -> FlaxBaseModelOutput:
        """The same, as it is compiled: `keep[B, S]` is bool."""
        past = 0 if cache is None else cache.length
        dtype = self.wpe[...].dtype
        at = past + jnp.arange(ids.shape[1])[None] if positions is None else positions
        x = self.wte.rows(ids, dtype) + self.wpe[...][at]
        seen, held = [x], []
        for number, block in enumerate(self.h):
            cached = None if cache is None else (cache.keys[number], cache.values[number])
            x, both = block(x, keep, cached, past)
            held.append(both)
            seen.append(x)
        x = self.ln_f(x)
        new = None
        if cache is not None:
            new = FlaxCache(tuple(key for key, _ in held), tuple(value for _, value in held), past + ids.shape[1])
        # transformers' convention: the last entry is after the final norm
        return FlaxBaseModelOutput(x, new, (*seen[:-1], x) if hidden else None)

    def _base(self) -> FlaxGPTNeoModel:
        return self


class FlaxGPTNeoForCausalLM(_PreTrained):
    """GPT-Neo with its language-modelling head, whose weight is the token embedding's unless the config unties it."""

    torch_class: ClassVar[type[PreTrainedModel]] = GPTNeoForCausalLM

    def __init__(self, config: GPTNeoConfig, source: TorchSource, dtype: Any) -> None:
        super().__init__(config, source, dtype)
        self.transformer = FlaxGPTNeoModel(config, source.inside("transformer"), dtype)
        self.lm_head = None if config.tie_word_embeddings else source.linear("lm_head", dtype)

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any | None = None,
        position_ids: Any | None = None,
        *,
        past_key_values: FlaxCache | None = None,
        output_hidden_states: bool = False,
    ) -> FlaxCausalLMOutput:
        """Logits of `input_ids[B, T]`; arguments and errors are `FlaxGPTNeoModel`'s."""
        output: FlaxCausalLMOutput = self._call(
            input_ids, attention_mask, position_ids, past_key_values, output_hidden_states
        )
        return output

    def forward(
        self,
        ids: Any,
        keep: Any | None,
        positions: Any | None,
        cache: FlaxCache | None,
        hidden: bool,
        last_only: bool = False,
    ) -> FlaxCausalLMOutput:
        """The same, as it is compiled; `last_only` gives logits [B, 1, V]."""
        output = self.transformer.forward(ids, keep, positions, cache, hidden)
        x = output.last_hidden_state[:, -1:] if last_only else output.last_hidden_state
        if self.lm_head is None:
            weight = self.transformer.wte.rows(None, x.dtype)
            logits = jnp.einsum("btc,vc->btv", x, weight, precision=PRECISION)
        else:
            logits = self.lm_head(x)
        return FlaxCausalLMOutput(logits, output.past_key_values, output.hidden_states)

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any | None = None,
        *,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
    ) -> Any:
        """`input_ids[B, T]` with up to `max_new_tokens` more, int32[B, T + new]: the likeliest, or drawn.

        Rows of different lengths are padded, on either side, and `attention_mask[B, T]` is 0 there: each is continued
        as it would be alone. A row that has reached `eos_token_id` (None: the configuration's, -1: none) is filled up
        with `pad_token_id` (None: the same token). The whole loop is one compiled program, with a cache.

        Raises ContextError where prompt and new tokens do not fit into the model's context.
        """
        return generate(
            self,
            input_ids,
            attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
        )

    def _base(self) -> FlaxGPTNeoModel:
        return self.transformer


@partial(jax.jit, static_argnums=(0, 6))
def _run(
    graph: Any, state: Any, ids: Any, keep: Any | None, positions: Any | None, cache: FlaxCache | None, hidden: bool
) -> Any:
    return nnx.merge(graph, state).forward(ids, keep, positions, cache, hidden)


def _float_type(dtype: Any) -> Any:
    names = {"float32": jnp.float32, "float16": jnp.float16, "bfloat16": jnp.bfloat16}
    try:
        name = str(jnp.dtype(dtype))
    except TypeError:
        name = str(dtype)
    if name not in names:
        raise RequestError(f"dtype is {name!r}; legal are {', '.join(names)}")
    return names[name]
