"""By how much errors of q, k and v show behind attention: against derivatives and against what happens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neoquant.calibration import attention_hessian as moments
from neoquant.model.config import GPTNeoConfig
from neoquant.model.gpt_neo import AttentionMasks, SelfAttention

T, C, HEADS, WINDOW = 12, 12, 3, 5


def make(layer: int) -> tuple[SelfAttention, Tensor, AttentionMasks]:
    torch.manual_seed(layer)
    config = GPTNeoConfig.from_dict(
        {
            "model_type": "gpt_neo", "vocab_size": 20, "hidden_size": C, "num_layers": 2, "num_heads": HEADS,
            "attention_types": [[["global", "local"], 1]], "window_size": WINDOW, "max_position_embeddings": T,
        }
    )  # fmt: skip
    attention = SelfAttention(config, layer, "eager").double().eval()
    for weight in attention.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return attention, torch.randn(2, T, C, dtype=torch.float64), AttentionMasks(T, T, WINDOW, None, torch.device("cpu"))


@pytest.mark.parametrize("layer", [0, 1], ids=["global", "local"])
def test_against_derivatives(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The derivative of the output by every query and key, from autograd, squared and summed over positions."""
    monkeypatch.setattr(moments, "POSITIONS", 2 * T)  # all of them
    monkeypatch.setattr(moments, "LEAST", T)
    attention, x, masks = make(layer)
    found = moments.attention_hessians(attention.float(), [x[:1].float(), x[1:].float()], 2)
    attention.double()
    query, key, value = (attention._split(proj(x)) for proj in (attention.q_proj, attention.k_proj, attention.v_proj))

    def output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [B, T, C]
        y = attention.attend(q, k, v, masks)
        return attention.out_proj(y.transpose(1, 2).flatten(2))

    for name, at, given in (("q_proj", 0, query), ("k_proj", 1, key)):

        def of(one: Tensor, at: int = at) -> Tensor:
            return output(*[one if i == at else other for i, other in enumerate((query, key, value))])

        J = torch.autograd.functional.jacobian(of, given)  # [B, T, C, B, H, T, D]
        expected = torch.einsum("btcnhsd,btcnhse->hde", J, J)
        assert torch.allclose(found[name].double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())), name
    W = attention.out_proj.weight.view(C, HEADS, -1)
    assert torch.allclose(found["v_proj"].double(), torch.einsum("chd,che->hde", W, W), atol=1e-4)


@torch.inference_mode()
def test_a_few_positions_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, _, _ = make(0)
    attention.float()
    x = torch.randn(256, T, C)
    found = {}
    for positions in (256 * 16, 256 * 4):
        monkeypatch.setattr(moments, "POSITIONS", positions)
        found[positions] = moments.attention_hessians(attention, [x], len(x))["q_proj"]
    assert torch.cosine_similarity(*(K.flatten(1) for K in found.values())).min() > 0.8  # of each head's matrix
    assert torch.equal(found[256 * 4], moments.attention_hessians(attention, x.split(7), len(x))["q_proj"])
