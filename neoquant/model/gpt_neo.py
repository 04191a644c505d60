"""GPT-Neo, to be read from top to bottom.

The network of Black et al. (2021): a GPT-2-like decoder whose layers alternate between attention over everything
before and attention over the last `window_size` positions. Two things set it apart from its relatives, and every
line about attention below depends on them: scores are **not** divided by the root of the head size, and query and
key are multiplied in float32, since without that division half precision overflows.

Module names are Hugging Face's, so that tensor names are, too. Shapes: B batch, T new positions, S all positions
(cached ones included), H heads, D head size, C hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neoquant.errors import ContextError, RequestError
from neoquant.model import attention
from neoquant.model.base import Network
from neoquant.model.cache import KVCache, given_cache, windows_of
from neoquant.model.config import GPTNeoConfig
from neoquant.model.outputs import BaseModelOutput, CausalLMOutput
from neoquant.model.tying import share_names
from neoquant.native import TorchAlone
from neoquant.sizes import plural

ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def attention_mask(T: int, S: int, window: int | None, keep: Tensor | None, device: torch.device) -> Tensor | None:
    """Which of S positions each of the last T may look at: bool `[T, S]` or `[B, 1, T, S]`, or None for all.

    Position i sees j where `0 <= i - j`, and `i - j < window` in a local layer; `keep[B, S]` is False on padding.
    A query that would see nothing (padding on the left) sees itself: its output is never used, but must be finite.
    """
    if keep is None and T == 1 and (window is None or window >= S):
        return None
    i = torch.arange(S - T, S, device=device)[:, None]  # [T, 1]
    j = torch.arange(S, device=device)[None, :]  # [1, S]
    mask = j <= i
    if window is not None:
        mask &= i - j < window
    if keep is None:
        return mask
    mask = mask & keep[:, None, None, :]  # [B, 1, T, S]
    return mask | (~mask.any(-1, keepdim=True) & (i == j))


class AttentionMasks:
    """The masks of one forward pass: made when a layer first asks, shared by all layers of its kind."""

    def __init__(self, T: int, S: int, window: int, keep: Tensor | None, device: torch.device) -> None:
        self.T, self.S, self.window, self.keep, self.device = T, S, window, keep, device
        self._made: dict[bool, tuple[int, Tensor | None]] = {}
        self._windows: dict[tuple[int, int], Tensor | None] = {}
        self._by_window: dict[tuple[int, int], Tensor] = {}
        self.weights: list[Tensor] | None = None
        """Where each layer leaves its weights `[B, H, T, S]`; None where nobody wants them."""
        self.heads: Tensor | None = None
        """What each layer's weights are multiplied by, `[L or 1, H]`; None for nothing."""

    def mask(self, local: bool, keys: int) -> Tensor | None:
        """Over the last `keys` positions: all that a layer holds, which are fewer than S where it is local."""
        if local not in self._made or self._made[local][0] != keys:  # which may be a symbol, and has no hash then
            window = self.window if local else None
            self._made[local] = keys, attention_mask(self.T, keys, window, self.kept(keys), self.device)
        return self._made[local][1]

    def kept(self, keys: int) -> Tensor | None:
        """Which of the last `keys` positions are no padding, bool `[B, keys]`."""
        return None if self.keep is None else self.keep[:, self.S - keys :]

    def to(self, device: torch.device) -> AttentionMasks:
        """The same, to be made on another device."""
        keep = None if self.keep is None else self.keep.to(device)
        moved = AttentionMasks(self.T, self.S, self.window, keep, device)
        moved.weights, moved.heads = self.weights, None if self.heads is None else self.heads.to(device)
        return moved

    @property
    def written_out(self) -> bool:
        """Whether something is done with the weights that has them written out."""
        return self.weights is not None or self.heads is not None

    def window_mask(self, T: int, S: int) -> Tensor | None:
        """The mask of the last T of S positions of a local layer without padding."""
        if (T, S) not in self._windows:
            self._windows[T, S] = attention_mask(T, S, self.window, None, self.device)
        return self._windows[T, S]

    def windows(self, B: int, keys: int) -> Tensor:
        """Of a local layer: what each query of a window's length may see of the two windows that end with its own, the
        last of n that cover the T queries ending with the last: bool `[B * n, 1, W, 2 W]`."""
        W, n = self.window, -(-self.T // self.window)
        if (B, keys) not in self._by_window:
            there = self.kept(keys)
            if there is None:
                there = torch.ones(1, keys, dtype=torch.bool, device=self.device)
            there = F.pad(there, ((n + 1) * W - keys, 0), value=False).unfold(1, 2 * W, W)[:, :, None, None]
            ahead = torch.arange(2 * W, device=self.device) - torch.arange(W, device=self.device)[:, None]
            mask = there & (ahead > 0) & (ahead <= W)  # [B or 1, n, 1, W, 2 W]
            mask = mask | (~mask.any(-1, keepdim=True) & (ahead == W))
            self._by_window[B, keys] = mask.expand(B, -1, -1, -1, -1).flatten(0, 1)
        return self._by_window[B, keys]

    def is_plain_causal(self, local: bool) -> bool:
        """Whether the mask is the lower triangle and nothing else, which needs no tensor."""
        return self.keep is None and self.T == self.S and (not local or self.window >= self.S)


Step = Callable[["Block", Tensor, AttentionMasks, KVCache | None], Tensor | None]
"""x[B, T, C] through a block to [B, T, C], its keys and values added to the cache; None where it does not do that."""


Steps = Callable[[nn.ModuleList, Tensor, AttentionMasks, KVCache | None], Tensor | None]
"""The same through all blocks, one behind the other."""


class FewPositions(Protocol):
    """What takes a few new positions to the logits of what follows, in the place of `CausalLM.forward`."""

    def logits(
        self, ids: Tensor, cache: KVCache, last: int, positions: Tensor | None, keep: Tensor | None
    ) -> Tensor | None:
        """Behind the last of ids[B, T], `[B, last, V]`; None where it does not do that."""


class SelfAttention(nn.Module):
    """Multi-head attention of one layer, global or local. No bias on q, k and v."""

    def __init__(self, config: GPTNeoConfig, layer: int, attn_implementation: str) -> None:
        super().__init__()
        C = config.hidden_size
        self.layer = layer
        self.local = config.attention_layers[layer] == "local"
        self.window_size = config.window_size
        self.num_heads = config.num_heads
        self.dropout = config.attention_dropout
        self.set_implementation(attn_implementation)
        self.k_proj = nn.Linear(C, C, bias=False)
        self.v_proj = nn.Linear(C, C, bias=False)
        self.q_proj = nn.Linear(C, C, bias=False)
        self.out_proj = nn.Linear(C, C, bias=True)
        self.resid_dropout = config.resid_dropout

    def set_implementation(self, name: str) -> None:
        """Let that one of ATTENTION_IMPLEMENTATIONS compute."""
        self.implementation = name
        self.attend = {
            "sdpa": self._sdpa,
            "eager": self._eager,
            "flex_attention": self._flex,
            "flash_attention_2": self._flash,
        }[name]

    def forward(self, x: Tensor, masks: AttentionMasks, cache: KVCache | None) -> Tensor:
        y: Tensor = self.out_proj(self.context(x, masks, cache))
        return F.dropout(y, self.resid_dropout) if self.training else y

    def context(self, x: Tensor, masks: AttentionMasks, cache: KVCache | None) -> Tensor:
        """What the heads give, side by side, [B, T, C]: what out_proj sees."""
        query, key, value = (self._split(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if cache is not None:
            key, value = cache.update(self.layer, key, value)
        attend = self._eager if masks.written_out else self.attend
        y = attend(query, key, value, masks)  # [B, H, T, D]
        return y.transpose(1, 2).flatten(2)

    def _split(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        return x.view(B, T, self.num_heads, C // self.num_heads).transpose(1, 2)  # [B, H, T, D]

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor, masks: AttentionMasks) -> Tensor:
        # scale=1.0: GPT-Neo does not scale. Every backend accumulates the scores of half-precision inputs in float32.
        dropout = self.dropout if self.training else 0.0
        compiled = torch.compiler.is_compiling()  # one graph for every length asks nothing about the window
        if not (self.local and compiled) and masks.is_plain_causal(self.local):
            return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=1.0)
        if masks.keep is None and masks.T == 1 and self.local and not compiled:
            # One new position sees exactly the last `window_size`: a slice does what a mask would.
            key, value = key[:, :, -self.window_size :], value[:, :, -self.window_size :]
            return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=1.0)
        if self.local and not compiled and self.window_size < masks.T:
            if query.device.type == "cuda":
                return self._by_windows(query, key, value, masks, dropout)
            if masks.keep is None:
                return self._by_stretches(query, key, value, masks, dropout)
        mask = masks.mask(self.local, key.shape[2])
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=1.0)

    def _by_stretches(self, query: Tensor, key: Tensor, value: Tensor, masks: AttentionMasks, dropout: float) -> Tensor:
        """Many queries of a local layer, a window's length at a time, each with the keys that it may see."""
        parts, past = [], key.shape[2] - masks.T
        for start in range(0, masks.T, self.window_size):
            stop = min(start + self.window_size, masks.T)
            seen = slice(max(0, past + start - self.window_size + 1), past + stop)
            part = F.scaled_dot_product_attention(
                query[:, :, start:stop], key[:, :, seen], value[:, :, seen],
                attn_mask=masks.window_mask(stop - start, seen.stop - seen.start), dropout_p=dropout, scale=1.0,
            )  # fmt: skip
            parts.append(part)
        return torch.cat(parts, dim=2)

    def _by_windows(self, query: Tensor, key: Tensor, value: Tensor, masks: AttentionMasks, dropout: float) -> Tensor:
        """The same as one call, since small ones do not fill a GPU: windows lie side by side as a batch's rows do, each
        with its keys and those of the window before."""
        (B, H, T, D), W, keys = query.shape, self.window_size, key.shape[2]
        n = -(-T // W)
        query = F.pad(query, (0, 0, n * W - T, 0)).reshape(B, H, n, W, D).transpose(1, 2)
        key, value = (
            F.pad(states, (0, 0, (n + 1) * W - keys, 0)).unfold(2, 2 * W, W).permute(0, 2, 1, 4, 3)
            for states in (key, value)
        )  # [B, n, H, 2 W, D]
        y = F.scaled_dot_product_attention(
            query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1),
            attn_mask=masks.windows(B, keys), dropout_p=dropout, scale=1.0,
        )  # fmt: skip
        return y.view(B, n, H, W, D).transpose(1, 2).flatten(2, 3)[:, :, -T:]

    def _eager(self, query: Tensor, key: Tensor, value: Tensor, masks: AttentionMasks) -> Tensor:
        scores = query.float() @ key.float().transpose(-1, -2)  # [B, H, T, S]; float32, since half overflows
        mask = masks.mask(self.local, key.shape[2])
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = F.dropout(scores.softmax(-1).to(value.dtype), self.dropout, self.training)
        if masks.heads is not None:
            weights = weights * masks.heads[min(self.layer, len(masks.heads) - 1), :, None, None].to(weights.dtype)
        if masks.weights is not None:  # a local layer may hold fewer positions
            missing = masks.S - key.shape[2]
            masks.weights.append(F.pad(weights, (missing, 0)) if missing else weights)
        return weights @ value

    def _flex(self, query: Tensor, key: Tensor, value: Tensor, masks: AttentionMasks) -> Tensor:
        if self.training and self.dropout:
            raise RequestError(f"flex_attention drops no weights, and attention_dropout is {self.dropout}: take sdpa")
        keep = masks.kept(key.shape[2])
        return attention.flex(query, key, value, self.window_size if self.local else None, keep)

    def _flash(self, query: Tensor, key: Tensor, value: Tensor, masks: AttentionMasks) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        keep = masks.kept(key.shape[2])
        return attention.flash(query, key, value, self.window_size if self.local else None, keep, dropout)


class Attention(nn.Module):
    """Nothing but the level of naming that Hugging Face's checkpoints have: `attn.attention`."""

    def __init__(self, config: GPTNeoConfig, layer: int, attn_implementation: str) -> None:
        super().__init__()
        self.attention = SelfAttention(config, layer, attn_implementation)

    def forward(self, x: Tensor, masks: AttentionMasks, cache: KVCache | None) -> Tensor:
        y: Tensor = self.attention(x, masks, cache)
        return y


class MLP(nn.Module):
    activation: str | None
    """The name of `act`, for whoever computes it otherwise; None where another function was put there."""

    def __init__(self, config: GPTNeoConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, config.inner_size)
        self.c_proj = nn.Linear(config.inner_size, config.hidden_size)
        self.act = ACTIVATION[config.activation_function]
        self.dropout = nn.Dropout(config.resid_dropout)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c_proj(self.act(self.c_fc(x)))
        return self.dropout(y) if self.training else y

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "act":
            self.activation = next((known for known, act in ACTIVATION.items() if act is value), None)


class Block(nn.Module):
    """One layer: attention and MLP, each behind a norm and beside a residual."""

    step: Step | None = None
    """What takes new positions through the block in one call, where something does."""

    def __init__(self, config: GPTNeoConfig, layer: int, attn_implementation: str) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer, attn_implementation)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, masks: AttentionMasks, cache: KVCache | None = None) -> Tensor:
        if self.step is not None and not masks.written_out:
            stepped = self.step(self, x, masks, cache)
            if stepped is not None:
                return stepped
        attended: Tensor = self.attn(self.ln_1(x), masks, cache)
        x = x + attended
        thought: Tensor = self.mlp(self.ln_2(x))
        return x + thought


class Decoder(Network):
    """The network without a head: token ids to hidden states."""

    base_model_prefix = ""
    steps: Steps | None = None
    """What takes new positions through all blocks in one call, where something does."""

    def __init__(self, config: GPTNeoConfig, attn_implementation: str = "sdpa") -> None:
        super().__init__(config, attn_implementation)
        self.gradient_checkpointing = False
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.drop = nn.Dropout(config.embed_dropout)
        self.h = nn.ModuleList(Block(config, layer, attn_implementation) for layer in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        past_key_values: KVCache | None = None,
        cache: KVCache | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        head_mask: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput:
        """Hidden states of `input_ids[B, T]` (or `inputs_embeds[B, T, C]`).

        `attention_mask[B, S]` is 0 on padding, which belongs on the right: positions are absolute, unless
        `position_ids[B, T]` says otherwise. With `past_key_values`, which transformers calls `cache` since 5.24, the T
        ids follow the positions it holds, and S = held + T. `use_cache` gives a cache to continue with.
        `token_type_ids[B, T]` are embedded by the token embedding, and added. `return_dict=False` gives a tuple. None
        is what the configuration says. `output_attentions` gives each block's attention weights: attention is computed
        as `attn_implementation="eager"` does then, which writes them out. So it is with `head_mask[H]` or `[L, H]`,
        by which the weights of each head are multiplied (transformers 4: 0 leaves a head out).
        While it trains with `gradient_checkpointing`, blocks are computed again for their gradients, without a cache.

        Raises ContextError beyond `max_position_embeddings`, RequestError for a `head_mask` of another shape.
        """
        past_key_values = given_cache(past_key_values, cache)
        with self._torch_alone():
            x = self._embed(input_ids, inputs_embeds, attention_mask)  # [B, T, C]
        T = x.shape[1]
        again = self.gradient_checkpointing and self.training and torch.is_grad_enabled() and past_key_values is None
        if not again and past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = KVCache(len(self.h), max(1, T), windows=windows_of(self.config)[: len(self.h)])
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        past = past_key_values.length if past_key_values is not None else 0
        with self._torch_alone():
            x = x + self.wpe(self._positions(position_ids, past, T, x.device))
            if token_type_ids is not None:
                x = x + self.wte(token_type_ids.view(-1, T))
        x = self.drop(x) if self.training else x
        keep = attention_mask.bool() if attention_mask is not None else None
        if keep is not None:
            _require_mask(keep, len(x), past, T)
        masks = AttentionMasks(T, past + T, self.config.window_size, keep, x.device)
        wanted = self.config.output_attentions if output_attentions is None else output_attentions
        masks.weights, masks.heads = [] if wanted else None, _heads(head_mask, self.config)
        seen: tuple[Tensor, ...] = (x,)
        whole = None if masks.written_out or output_hidden_states else self.steps
        stepped = whole(self.h, x, masks, past_key_values) if whole else None
        for block in self.h if stepped is None else ():
            device = block.get_parameter("ln_1.weight").device
            if x.device != device:  # the blocks are spread over devices
                x, masks = x.to(device), masks.to(device)
            x = checkpoint(block, x, masks, use_reentrant=False) if again else block(x, masks, past_key_values)
            if output_hidden_states:
                seen += (x,)
        x = x if stepped is None else stepped
        with self._torch_alone():
            x = self.ln_f(x.to(self.ln_f.weight.device))
        # transformers' convention: the last entry is after the final norm
        hidden_states = (*seen[:-1], x) if output_hidden_states else None
        attentions = None if masks.weights is None else tuple(masks.weights)
        return self.output(BaseModelOutput(x, past_key_values, hidden_states, attentions), return_dict)

    def _torch_alone(self) -> AbstractContextManager[None]:
        """For what is small beside the blocks, where the library computes these."""
        taken = self.steps is not None and not self.training and not torch.compiler.is_compiling()
        return TorchAlone() if taken else nullcontext()

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise RequestError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is not None:
            return inputs_embeds
        assert input_ids is not None
        if attention_mask is not None and attention_mask.dim() == 2:  # padding may have an id that no token has
            hidden = attention_mask[:, -input_ids.shape[1] :] == 0
            if hidden.shape == input_ids.shape:
                input_ids = input_ids.masked_fill(hidden.to(input_ids.device), 0)
        x: Tensor = self.wte(input_ids)
        return x

    def _positions(self, position_ids: Tensor | None, past: int, T: int, device: torch.device) -> Tensor:
        limit = self.config.max_position_embeddings
        if position_ids is None:
            if past + T > limit:
                raise ContextError(f"{past + T} positions; this model has {limit}")
            return torch.arange(past, past + T, device=device)[None]
        # Behind the first positions on a GPU, the device asserts it: to look at every token is to wait for it.
        looked_at = (position_ids.device.type == "cpu" or past == 0) and not torch.compiler.is_compiling()
        if looked_at and position_ids.numel() and int(position_ids.max()) >= limit:
            raise ContextError(f"position {int(position_ids.max())}; this model's are 0 to {limit - 1}")
        return position_ids


def _require_mask(keep: Tensor, rows: int, past: int, T: int) -> None:
    """Raise RequestError unless a mask is of so many rows, or of one for all, and of all positions."""
    if keep.ndim != 2 or keep.shape[0] not in (1, rows):
        legal = f"[{rows}, {past + T}], 0 on padding"
        raise RequestError(f"attention_mask is {list(keep.shape)}; legal is {legal}")
    if keep.shape[1] != past + T:
        covered = plural(keep.shape[1], "position")
        raise RequestError(f"attention_mask covers {covered}; {past} held + {T} new are {past + T}")


def _heads(head_mask: Tensor | None, config: GPTNeoConfig) -> Tensor | None:
    """A row for each layer, or one for all. Raises RequestError for another shape."""
    if head_mask is None:
        return None
    legal = ((config.num_heads,), (config.num_layers, config.num_heads))
    if tuple(head_mask.shape) not in legal:
        raise RequestError(
            f"head_mask is {list(head_mask.shape)}; legal are {' and '.join(str(list(s)) for s in legal)}"
        )
    return head_mask.view(-1, config.num_heads)


class CausalLM(Network):
    """GPT-Neo with its language-modelling head, whose weight is the token embedding's unless the config unties it."""

    direct_pass: Callable[[CausalLM, bool], FewPositions] | None = None
    """Makes what takes them, where something does; told whether nobody changes the model while it is used."""

    def __init__(self, config: GPTNeoConfig, attn_implementation: str = "sdpa") -> None:
        super().__init__(config, attn_implementation)
        self.transformer = Decoder(config, attn_implementation)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        share_names(self)

    def tied_weights(self) -> dict[str, str]:
        """Weights that are another's, by name: the head's, where the configuration ties it to the embedding."""
        return {"lm_head.weight": "transformer.wte.weight"} if self.config.tie_word_embeddings else {}

    accepts_loss_kwargs, loss_type = True, "ForCausalLM"
    """What transformers' Trainer asks: whether `forward` takes `num_items_in_batch`, and which labels count in it."""

    def tie_weights(self) -> None:
        """Make the head's weight the embedding's own tensor, where the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        past_key_values: KVCache | None = None,
        cache: KVCache | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        head_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutput:
        """`logits[B, T, V]`, or of the last `logits_to_keep` positions only (0: all).

        With `labels[B, T]`, the mean negative log-likelihood in nats of each label given what is before it; -100 is
        left out. `num_items_in_batch` is divided by instead of the number of labels, as where a batch comes in several
        calls. The other arguments are Decoder's.
        """
        base = self.transformer(
            input_ids,
            attention_mask,
            past_key_values=past_key_values,
            cache=cache,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            head_mask=head_mask,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        hidden = base.last_hidden_state[:, -logits_to_keep:]
        logits = self.lm_head(hidden.to(self._head_device()))
        loss = None
        if labels is not None:
            shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
            shifted = shifted[:, -logits_to_keep:]
            reduction = "mean" if num_items_in_batch is None else "sum"
            flat = shifted.flatten().to(logits.device)
            loss = F.cross_entropy(logits.float().flatten(0, 1), flat, reduction=reduction)
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        output = CausalLMOutput(loss, logits, base.past_key_values, base.hidden_states, base.attentions)
        return self.output(output, return_dict)

    def _head_device(self) -> torch.device:
        return next(chain(self.lm_head.parameters(), self.lm_head.buffers())).device  # quantized, it has only buffers
