"""The network against transformers' eager one, on configurations nobody would choose."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neoquant.errors import ContextError, RequestError
from neoquant.loading.pretrained import (
    GPTNeoForCausalLM,
    GPTNeoForQuestionAnswering,
    GPTNeoForSequenceClassification,
    GPTNeoForTokenClassification,
    GPTNeoModel,
)
from neoquant.model.config import GPTNeoConfig
from neoquant.model.gpt_neo import AttentionMasks, SelfAttention, attention_mask

SMALL: dict[str, Any] = {
    "vocab_size": 31,
    "max_position_embeddings": 16,
    "hidden_size": 12,
    "num_heads": 3,
    "num_layers": 2,
    "window_size": 4,
    "attention_types": [[["global", "local"], 1]],
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CLASSES = (
    GPTNeoModel,
    GPTNeoForCausalLM,
    GPTNeoForSequenceClassification,
    GPTNeoForTokenClassification,
    GPTNeoForQuestionAnswering,
)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(st.integers(1, 4))
    pattern = draw(st.sampled_from([["global"], ["local"], ["global", "local"], ["local", "local", "global"]]))
    repeats = draw(st.integers(1, 2))
    return {
        "vocab_size": draw(st.integers(5, 97)),
        "max_position_embeddings": 24,
        "hidden_size": heads * draw(st.sampled_from([1, 3, 4, 8])),
        "num_heads": heads,
        "num_layers": len(pattern) * repeats,
        "attention_types": [[pattern, repeats]],
        "intermediate_size": draw(st.sampled_from([None, 7, 20])),
        "window_size": draw(st.sampled_from([1, 2, 4, 5, 40])),
        "activation_function": draw(st.sampled_from(["gelu_new", "relu", "gelu"])),
        "tie_word_embeddings": draw(st.booleans()),
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "num_labels": draw(st.integers(1, 4)),
    }


def pair(values: dict[str, Any], cls: type, implementation: str, seed: int) -> tuple[Any, Any]:
    """transformers' eager model with weights large enough to matter, and ours with the same."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    theirs = getattr(transformers, cls.__name__)._from_config(
        transformers.GPTNeoConfig(**values), attn_implementation="eager"
    )
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ours = cls(GPTNeoConfig.from_dict(values), implementation)
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    ours, theirs = ours.detach(), theirs.detach()
    # A norm over two values that are nearly equal (hidden size 2) enlarges rounding errors: hence not 1e-6.
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def batch(values: dict[str, Any], rows: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids `[rows, length]` without the padding id, and a mask with padding on the right of all rows but the first."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, values["vocab_size"], (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        kept = int(torch.randint(1, length + 1, (1,), generator=generator))
        mask[row, kept:], ids[row, kept:] = 0, values["pad_token_id"]
    return ids, mask


@settings(deadline=None, max_examples=40)
@given(configs(), st.sampled_from(CLASSES), st.sampled_from(["sdpa", "eager"]), st.integers(0, 999), st.integers(1, 20))
def test_every_class_equals_transformers(
    values: dict[str, Any], cls: type, implementation: str, seed: int, length: int
) -> None:
    theirs, ours = pair(values, cls, implementation, seed)
    ids, mask = batch(values, 3, length, seed)
    with torch.no_grad():
        for kwargs in ({}, {"attention_mask": mask}):
            expected, got = theirs(ids, **kwargs), ours(ids, **kwargs)
            real = mask.bool() if kwargs else torch.ones_like(mask).bool()
            for field in ("last_hidden_state", "logits", "start_logits", "end_logits"):
                if field in expected:
                    a, b = got[field], expected[field]
                    per_token = a.shape[:2] == ids.shape and cls is not GPTNeoForSequenceClassification
                    assert_close(a[real] if per_token else a, b[real] if per_token else b)


@settings(deadline=None, max_examples=25)
@given(configs(), st.sampled_from(["sdpa", "eager"]), st.integers(0, 999), st.lists(st.integers(1, 6), min_size=1))
def test_decoding_with_a_cache_equals_without(
    values: dict[str, Any], implementation: str, seed: int, steps: list[int]
) -> None:
    theirs, ours = pair(values, GPTNeoForCausalLM, implementation, seed)
    steps = steps[: max(1, next((i for i in range(len(steps)) if sum(steps[: i + 1]) > 24), len(steps)))]
    ids, _ = batch(values, 2, sum(steps), seed)
    with torch.no_grad():
        whole = ours(ids).logits
        assert_close(whole, theirs(ids).logits)
        cache, parts = None, []
        for part in ids.split(steps, dim=1):
            out = ours(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    assert cache.get_seq_length() == sum(steps)
    assert_close(torch.cat(parts, dim=1), whole)


@settings(deadline=None, max_examples=15)
@given(configs(), st.integers(0, 999), st.integers(2, 12))
def test_cached_decoding_of_a_padded_batch(values: dict[str, Any], seed: int, length: int) -> None:
    """Positions after right padding, their own position ids given, see what they would see in a cache-less pass."""
    _, ours = pair(values, GPTNeoForCausalLM, "sdpa", seed)
    ids, mask = batch(values, 2, length, seed)
    more = torch.randint(2, values["vocab_size"], (2, 3))
    full_mask = torch.cat([mask, torch.ones(2, 3, dtype=mask.dtype)], dim=1)
    with torch.no_grad():
        whole = ours(torch.cat([ids, more], 1), full_mask).logits
        cache = ours(ids, mask, use_cache=True).past_key_values
        last = ours(more, full_mask, past_key_values=cache).logits
    assert_close(last, whole[:, length:])


@pytest.mark.parametrize("cls", CLASSES[1:])
def test_losses_equal_transformers(cls: type) -> None:
    values = SMALL | {"pad_token_id": 1, "num_labels": 3}
    theirs, ours = pair(values, cls, "sdpa", 0)
    ids, _ = batch(values, 3, 9, 0)
    labels: dict[str, torch.Tensor]
    if cls is GPTNeoForQuestionAnswering:
        labels = {"start_positions": torch.tensor([0, 3, 99]), "end_positions": torch.tensor([2, 8, 4])}
    elif cls is GPTNeoForSequenceClassification:
        labels = {"labels": torch.tensor([0, 2, 1])}
    else:
        labels = {"labels": (ids % 3 if cls is GPTNeoForTokenClassification else ids).masked_fill(ids == 1, -100)}
    assert_close(ours(ids, **labels).loss, theirs(ids, **labels).loss)


@pytest.mark.parametrize(
    ("num_labels", "labels"),
    [(1, torch.tensor([0.5, -1.0])), (3, torch.tensor([[1.0, 0, 1], [0, 0, 1]])), (3, torch.tensor([2, 0]))],
)
def test_problem_types_are_guessed_as_transformers_does(num_labels: int, labels: torch.Tensor) -> None:
    values = SMALL | {"pad_token_id": 1, "num_labels": num_labels}
    theirs, ours = pair(values, GPTNeoForSequenceClassification, "sdpa", 1)
    ids, _ = batch(values, 2, 5, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_close(ours(ids, labels=labels).loss, theirs(ids, labels=labels).loss)


def test_hidden_states_and_kept_logits_equal_transformers() -> None:
    theirs, ours = pair(SMALL, GPTNeoForCausalLM, "sdpa", 2)
    ids = torch.randint(0, 31, (2, 7))
    kwargs = {"output_hidden_states": True, "token_type_ids": ids % 2, "logits_to_keep": 3}
    expected, got = theirs(ids, **kwargs), ours(ids, **kwargs)
    assert got.logits.shape == (2, 3, 31)
    assert_close(got.logits, expected.logits)
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert_close(a, b)
    embedded = ours.transformer.wte(ids)
    assert_close(ours(inputs_embeds=embedded).logits, theirs(inputs_embeds=embedded).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_beyond_half_precision_do_not_overflow(dtype: torch.dtype) -> None:
    """Query times key reaches 10^6 here: float16 ends at 65,504."""
    config = GPTNeoConfig(
        vocab_size=17, max_position_embeddings=16, hidden_size=64, num_heads=1, num_layers=2, window_size=4,
        attention_types=[[["global", "local"], 1]],
    )  # fmt: skip
    outputs = []
    for implementation, kind in (("eager", torch.float32), ("eager", dtype), ("sdpa", dtype)):
        model = GPTNeoForCausalLM(config, implementation).init_weights(seed=0).eval()
        with torch.no_grad():
            for block in model.transformer.h:
                block.attn.attention.q_proj.weight.mul_(1e4)
                block.attn.attention.k_proj.weight.mul_(1e3)
        # the same rounded weights and activations in every type, so that only the products differ
        model.to(dtype).to(kind)
        ids = torch.arange(12)[None]
        with torch.no_grad():
            attention = model.transformer.h[0].attn.attention
            x = model.transformer.h[0].ln_1(model.transformer.wte(ids))
            assert (attention.q_proj(x).float() @ attention.k_proj(x).float().mT).abs().max() > 65504
            outputs.append(model(ids).logits.float())
    assert all(output.isfinite().all() for output in outputs)
    assert_close(outputs[2].to(dtype).float() / 50, outputs[1] / 50)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(0, 9), st.sampled_from([None, 1, 3, 20]), st.booleans(), st.integers(0, 99))
def test_attention_mask_against_its_definition(T: int, past: int, window: int | None, padded: bool, seed: int) -> None:
    S = T + past
    keep = torch.rand(2, S, generator=torch.Generator().manual_seed(seed)) < 0.6 if padded else None
    mask = attention_mask(T, S, window, keep, torch.device("cpu"))
    for b in range(2):
        for i in range(T):
            legal = [
                j
                for j in range(S)
                if 0 <= past + i - j < (window or S + 1) and (keep is None or bool(keep[b, j]))
            ] or [past + i]  # fmt: skip
            if mask is None:
                assert legal == list(range(S))
            else:
                row = mask[i] if keep is None else mask[b, 0, i]
                assert row.nonzero()[:, 0].tolist() == legal


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 20), st.integers(0, 9), st.sampled_from([1, 3, 4]), st.booleans(), st.integers(0, 99))
def test_windows_side_by_side_are_one_mask_over_everything(
    T: int, past: int, window: int, padded: bool, seed: int
) -> None:
    config = GPTNeoConfig(
        vocab_size=9, max_position_embeddings=64, hidden_size=8, num_heads=2, num_layers=2, window_size=window,
        attention_types=[[["global", "local"], 1]],
    )  # fmt: skip
    random, S = torch.Generator().manual_seed(seed), T + past
    query, (key, value) = torch.randn(2, 2, T, 4, generator=random), torch.randn(2, 2, 2, S, 4, generator=random)
    keep = torch.rand(2, S, generator=random) < 0.6 if padded else None
    masks = AttentionMasks(T, S, window, keep, query.device)
    found = SelfAttention(config, 1, "sdpa")._by_windows(query, key, value, masks, 0.0)
    whole = masks.mask(True, S)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=whole, scale=1.0)
    assert torch.allclose(found, expected, atol=1e-5)


def test_no_output_is_nan_under_left_padding() -> None:
    config = GPTNeoConfig(
        vocab_size=17, max_position_embeddings=16, hidden_size=8, num_heads=2, num_layers=2, window_size=2,
        attention_types=[[["global", "local"], 1]],
    )  # fmt: skip
    for implementation in ("sdpa", "eager"):
        model = GPTNeoForCausalLM(config, implementation).init_weights(seed=0).eval()
        mask = torch.tensor([[0, 0, 0, 0, 1, 1]])
        assert model(torch.arange(6)[None], mask).logits.isfinite().all()


def test_beyond_the_context_is_a_clear_error() -> None:
    config = GPTNeoConfig(
        vocab_size=17, max_position_embeddings=8, hidden_size=8, num_heads=2, num_layers=2, window_size=2,
        attention_types=[[["global", "local"], 1]], pad_token_id=None,
    )  # fmt: skip
    model = GPTNeoForCausalLM(config).init_weights(seed=0).eval()
    with pytest.raises(ContextError, match=r"9 positions; this model has 8"):
        model(torch.zeros(1, 9, dtype=torch.long))
    cache = model(torch.zeros(1, 8, dtype=torch.long), use_cache=True).past_key_values
    with pytest.raises(ContextError, match="9 positions"):
        model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
    with pytest.raises(ContextError, match="position 8"):
        model(torch.zeros(1, 1, dtype=torch.long), position_ids=torch.tensor([[8]]))
    with pytest.raises(RequestError, match="attention_mask covers 3 positions"):
        model(torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 3))
    for shape in ((3, 2), (2,), (1, 1, 2, 2)):
        with pytest.raises(RequestError, match=re.escape(f"attention_mask is {list(shape)}; legal is [1, 2], 0 on")):
            model(torch.zeros(1, 2, dtype=torch.long), torch.ones(shape))
    with pytest.raises(RequestError, match="exactly one of input_ids"):
        model()
    with pytest.raises(RequestError, match="attn_implementation is 'fast'; legal are sdpa, eager"):
        GPTNeoForCausalLM(config, "fast")
    with pytest.raises(RequestError, match="pad_token_id"):
        GPTNeoForSequenceClassification(config)(torch.zeros(2, 3, dtype=torch.long))


def test_gradients_flow_and_tied_weights_are_one_tensor() -> None:
    config = GPTNeoConfig(
        vocab_size=17, max_position_embeddings=8, hidden_size=8, num_heads=2, num_layers=2, window_size=2,
        attention_types=[[["global", "local"], 1]],
    )  # fmt: skip
    model = GPTNeoForCausalLM(config).init_weights(seed=0)
    assert model.lm_head.weight is model.transformer.wte.weight
    ids = torch.arange(8)[None]
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
