"""Every attention implementation equals the eager one, window and padding included; one that is missing is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from neoquant.errors import RequestError
from neoquant.loading.pretrained import GPTNeoForCausalLM, GPTNeoModel
from neoquant.model.attention import flash, why_not
from neoquant.model.config import GPTNeoConfig

CONFIG = GPTNeoConfig(
    vocab_size=41, max_position_embeddings=40, hidden_size=16, num_heads=2, num_layers=2, window_size=3,
    attention_types=[[["global", "local"], 1]], bos_token_id=0, eos_token_id=0,
)  # fmt: skip
PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1], [1] * 11, [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]])


def models(implementation: str, dtype: torch.dtype = torch.float32) -> tuple[GPTNeoForCausalLM, GPTNeoForCausalLM]:
    eager = GPTNeoForCausalLM(CONFIG, "eager").init_weights(seed=1)
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.mul_(8)
    other = GPTNeoForCausalLM(CONFIG, implementation)
    other.load_state_dict(eager.state_dict())
    return eager.to(dtype).eval(), other.to(dtype).eval()


def reference(query: Tensor, key: Tensor, value: Tensor, causal: bool, window: tuple[int, int], scale: float) -> Tensor:
    """Attention as flash-attn documents it, one query at a time: [T, H, D] on [S, H, D], aligned at the last ones."""
    T, S = len(query), len(key)
    out = torch.zeros_like(query)
    for i in range(T):
        at = i + S - T
        first = 0 if window[0] < 0 else max(0, at - window[0])
        last = at if causal else S - 1
        if last >= first:
            scores = torch.einsum("hd,shd->hs", query[i].double(), key[first : last + 1].double()) * scale
            weights = scores.softmax(-1)
            out[i] = torch.einsum("hs,shd->hd", weights, value[first : last + 1].double()).to(out.dtype)
    return out


def stand_in() -> SimpleNamespace:
    """The two functions of the package flash-attn that are used, without its GPU."""

    def dense(
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size: Any
    ) -> Tensor:
        return torch.stack([reference(*row, causal, window_size, softmax_scale) for row in zip(q, k, v, strict=True)])

    def ragged(
        q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, longest_q: int, longest_k: int,
        dropout_p: float, softmax_scale: float, causal: bool, window_size: Any,
    ) -> Tensor:  # fmt: skip
        assert ends_q.dtype == ends_k.dtype == torch.int32
        assert (longest_q, longest_k) == (int(ends_q.diff().max()), int(ends_k.diff().max()))
        out = torch.empty_like(q)
        for a, b, c, d in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False):
            out[a:b] = reference(q[a:b], k[c:d], v[c:d], causal, window_size, softmax_scale)
        return out

    return SimpleNamespace(flash_attn_func=dense, flash_attn_varlen_func=ragged)


@pytest.fixture(params=["sdpa", "flex_attention", "flash_attention_2"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "flash_attention_2":
        monkeypatch.setitem(sys.modules, "flash_attn", stand_in())
    return str(request.param)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_eager(implementation: str, dtype: torch.dtype, padded: bool) -> None:
    eager, other = models(implementation, dtype)
    ids = torch.randint(1, 41, (3, 11), generator=torch.Generator().manual_seed(2))
    keep = PADDED if padded else None
    seen = torch.ones(3, 11, dtype=torch.bool) if keep is None else keep.bool()
    with torch.no_grad():
        expected, got = eager(ids, keep).logits, other(ids, keep).logits
    assert got.isfinite().all()
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    assert (got - expected)[seen].abs().max() <= bound * expected[seen].abs().max()


def test_it_continues_padded_prompts_from_a_cache_as_eager_does(implementation: str) -> None:
    eager, other = models(implementation)
    ids = torch.randint(1, 41, (3, 11), generator=torch.Generator().manual_seed(3))
    for keep in (None, PADDED):
        options: dict[str, Any] = {"attention_mask": keep, "max_new_tokens": 4, "eos_token_id": []}
        assert torch.equal(other.generate(ids, **options), eager.generate(ids, **options))


def test_scores_beyond_half_precision_do_not_overflow() -> None:
    eager, flex = models("flex_attention", torch.bfloat16)
    with torch.no_grad():
        for model in (eager, flex):
            model.half()
            for block in model.transformer.h:
                block.attn.attention.q_proj.weight.mul_(200)
                block.attn.attention.k_proj.weight.mul_(200)
        logits = flex(torch.arange(1, 12)[None]).logits
        assert torch.allclose(logits, eager(torch.arange(1, 12)[None]).logits, rtol=2e-2, atol=2e-2)


def test_what_is_not_installed_is_refused_by_name(tiny_model: Path) -> None:
    with pytest.raises(
        RequestError, match=r"attn_implementation 'flash_attention_2' is not possible here: .*flash-attn"
    ):
        GPTNeoForCausalLM.from_pretrained(tiny_model, attn_implementation="flash_attention_2")
    with pytest.raises(RequestError, match="'paged'; legal are sdpa, eager, flex_attention, flash_attention_2"):
        GPTNeoForCausalLM.from_pretrained(tiny_model, attn_implementation="paged")


def test_where_flash_attention_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neoquant.model.attention.find_spec", lambda name: object())
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert why_not("flash_attention_2", torch.float16, gpu) is None
    assert "CUDA device, not cpu" in str(why_not("flash_attention_2", torch.float16, cpu))
    assert "not float32" in str(why_not("flash_attention_2", torch.float32, gpu))
    assert why_not("sdpa", torch.float32, cpu) is None


def test_what_they_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in())
    model = GPTNeoModel(CONFIG, "flex_attention").init_weights(seed=1)
    with pytest.raises(RequestError, match="no gradients on a CPU: take sdpa"):
        model(torch.ones(1, 3, dtype=torch.long))
    x = torch.ones(1, 1, 3, 4)
    with pytest.raises(RequestError, match="gaps between tokens"):
        flash(x, x, x, None, torch.tensor([[True, False, True]]))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sdpa", "flex_attention"])
def test_it_equals_eager_on_a_gpu(name: str) -> None:
    if name == "flex_attention" and torch.cuda.get_device_name() == "simulated":
        pytest.skip("flex_attention is compiled, for which the device must be there")
    config = GPTNeoConfig(
        vocab_size=41, max_position_embeddings=300, hidden_size=64, num_heads=2, num_layers=2, window_size=100,
        attention_types=[[["global", "local"], 1]],
    )  # fmt: skip
    eager, other = GPTNeoForCausalLM(config, "eager").init_weights(seed=1), GPTNeoForCausalLM(config, name)
    other.load_state_dict(eager.state_dict())
    ids, keep = torch.randint(1, 41, (2, 300)).cuda(), torch.ones(2, 300, dtype=torch.long).cuda()
    keep[0, :50] = 0
    with torch.no_grad():
        expected, got = (model.cuda().half()(ids, keep).logits[keep.bool()] for model in (eager, other))
    assert (got - expected).abs().max() <= 2e-2 * expected.abs().max()
