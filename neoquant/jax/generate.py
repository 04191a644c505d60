"""Continuing a text: prompt and loop in one compiled program."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from neoquant.errors import ContextError, RequestError
from neoquant.jax.cache import FlaxCache
from neoquant.jax.checks import require_within
from neoquant.sizes import plural


def generate(
    model: nnx.Module,  # a FlaxGPTNeoForCausalLM
    input_ids: Any,
    attention_mask: Any | None,
    *,
    max_new_tokens: int,
    do_sample: bool,
    temperature: float,
    top_k: int,
    seed: int,
    eos_token_id: int | None,
    pad_token_id: int | None,
) -> Any:
    """`FlaxGPTNeoForCausalLM.generate`."""
    ids = np.asarray(input_ids).astype(np.int32)
    if ids.ndim != 2:
        raise RequestError(f"input_ids is [B, T], got {list(ids.shape)}")
    T, limit = ids.shape[1], model.config.max_position_embeddings
    for name, value, legal, what in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "at least 0"),
        ("temperature", temperature, temperature > 0, "above 0"),
        ("top_k", top_k, top_k >= 0, "at least 0 (0 keeps all)"),
    ):
        if not legal:
            raise RequestError(f"{name} is {value}; legal is {what}")
    if T < 1:
        raise RequestError("the prompt is empty: it needs at least one token, for example the end-of-text token")
    if T + max_new_tokens > limit:
        raise ContextError(f"{plural(T, 'token')} of prompt and {max_new_tokens} new; this model's context is {limit}")
    aligned, keep = _align(ids, attention_mask)
    require_within("input_ids", aligned, model.config.vocab_size)
    if max_new_tokens == 0:
        return jnp.asarray(ids)
    eos = model.config.eos_token_id if eos_token_id is None else eos_token_id
    eos = -1 if eos is None else eos
    fill = max(0, eos) if pad_token_id is None else pad_token_id
    graph, state = nnx.split(model)
    cache = model.init_cache(ids.shape[0], T + max_new_tokens)
    draw = (float(temperature), int(top_k)) if do_sample else None
    new, count = _loop(graph, state, aligned, keep, cache, jax.random.key(seed), eos, fill, max_new_tokens, draw)
    return jnp.concatenate([ids, new[:, : int(count)]], axis=1)


def _align(ids: Any, attention_mask: Any | None) -> tuple[Any, Any]:
    """`ids[B, T]` with all padding moved to the left, where it is 0, and which positions hold tokens, bool [B, T].

    Padding may have an id that no token has.
    """
    keep = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
    if keep.shape != ids.shape:
        raise RequestError(f"attention_mask is {list(keep.shape)}, but input_ids is {list(ids.shape)}")
    if not keep.any(1).all():
        raise RequestError("attention_mask leaves a row no token: every prompt needs at least one")
    order = np.argsort(keep, axis=1, kind="stable")
    return np.take_along_axis(np.where(keep, ids, 0), order, 1), np.take_along_axis(keep, order, 1)


@partial(jax.jit, static_argnums=(0, 8, 9))
def _loop(
    graph: Any,
    state: Any,
    ids: Any,
    keep: Any,
    cache: FlaxCache,
    key: Any,
    eos: Any,
    fill: Any,
    count: int,
    draw: tuple[float, int] | None,
) -> tuple[Any, Any]:
    """New ids, int32[B, count], and how many of the columns were made before all rows had ended."""
    model = nnx.merge(graph, state)
    B = ids.shape[0]
    rows = jnp.arange(B)
    positions = jnp.maximum(jnp.cumsum(keep, axis=1) - 1, 0)
    seen = jnp.concatenate([keep, jnp.ones((B, count), bool)], axis=1)

    def step(new: Any, at: Any, cache: FlaxCache, ended: Any, key: Any) -> tuple[Any, FlaxCache, Any]:
        output = model.forward(new, seen, at, cache, False, last_only=True)
        chosen = _choose(output.logits[:, -1].astype(jnp.float32), key, draw)
        chosen = jnp.where(ended, fill, chosen)
        return chosen, output.past_key_values, ended | (chosen == eos)

    def go_on(carry: Any) -> Any:
        n, _, _, _, ended, _ = carry
        return (n < count) & ~ended.all()

    def again(carry: Any) -> Any:
        n, made, cache, at, ended, key = carry
        key, drawn = jax.random.split(key)
        chosen, cache, ended = step(made[rows, n - 1][:, None], at, cache, ended, drawn)
        return n + 1, made.at[:, n].set(chosen), cache, at + 1, ended, key

    key, drawn = jax.random.split(key)
    first, cache, ended = step(ids, positions, cache, jnp.zeros(B, bool), drawn)
    made = jnp.zeros((B, count), jnp.int32).at[:, 0].set(first)
    n, made, *_ = jax.lax.while_loop(go_on, again, (1, made, cache, positions[:, -1:] + 1, ended, key))
    return made, n


def _choose(logits: Any, key: Any, draw: tuple[float, int] | None) -> Any:
    """The next token of each row of logits[B, V]: the likeliest, or drawn from the `top_k` likeliest."""
    if draw is None:
        return logits.argmax(-1).astype(jnp.int32)
    temperature, top_k = draw
    # Differences from the largest: a quotient by a tiny temperature may be beyond float32.
    logits = (logits - logits.max(-1, keepdims=True)) / max(temperature, float(jnp.finfo(jnp.float32).tiny))
    if 0 < top_k < logits.shape[-1]:
        logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][:, -1:], -jnp.inf, logits)
    return jax.random.categorical(key, logits).astype(jnp.int32)
