"""By how much errors of queries, keys and values show in what attention adds to the hidden states.

A layer's own output is the wrong place to measure the error of q, k and v: an error in a query counts where keys
differ, one in a value as far as out_proj passes it on. To first order, the squared error that one of the three layers
causes behind out_proj is, for each head, tr(K D H Dᵀ) with the layer's error D[size, C], the second moments H of its
inputs and a matrix K[size, size] of what follows. The first-order terms, for the attention weights p of a query, the
keys k, the values v, their mean o under p, and the head's part W of out_proj, with M = Wᵀ W:

    q    an error d in the query changes the output by W S d, S = sum_j p_j (v_j - o) k_jᵀ:  K = mean of Sᵀ M S
    k    an error d_j in a key changes it by W p_j (v_j - o) (q . d_j):  K = mean of sum_j p_j² |W (v_j - o)|² q qᵀ
    v    K = M

K and H are averaged apart, as in Kronecker-factored curvature (Martens & Grosse, arXiv:1503.05671); nothing needs a
backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from neoquant.model.gpt_neo import SelfAttention

POSITIONS = 1024  # queries that are looked at, spread over all rows; more changed nothing that could be measured


def output_moments(attention: SelfAttention, inputs: Iterable[Tensor], rows: int) -> dict[str, Tensor]:
    """K of q_proj, k_proj and v_proj, float32[heads, size, size] each.

    Args:
        attention: with its weights as they were before quantization.
        inputs: what it sees, float32[B, T, C] piece by piece, `rows` in all.
        rows: see `inputs`.
    """
    heads = attention.num_heads
    out = attention.out_proj.weight.detach().float()
    W = out.view(len(out), heads, -1).transpose(0, 1)  # [H, C, D]
    M = W.transpose(1, 2) @ W
    K_q, K_k = torch.zeros_like(M), torch.zeros_like(M)
    random = torch.Generator().manual_seed(0)
    for piece in inputs:
        for x in piece:
            positions = torch.randperm(len(x), generator=random)[: max(1, POSITIONS // rows)]
            q, k, v = (
                proj(x).view(len(x), heads, -1).transpose(0, 1)  # [H, T, D]
                for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            for position in positions.tolist():
                first = max(0, position + 1 - attention.window_size) if attention.local else 0
                of_q, of_k = _one_query(q[:, position], k[:, first : position + 1], v[:, first : position + 1], M)
                K_q += of_q
                K_k += of_k
    return {"q_proj": K_q, "k_proj": K_k, "v_proj": M}


def _one_query(q: Tensor, k: Tensor, v: Tensor, M: Tensor) -> tuple[Tensor, Tensor]:
    """What one query adds to K of q_proj and of k_proj: q[H, D], k and v [H, S, D], M[H, D, D]."""
    p = (k @ q[:, :, None]).softmax(1)  # [H, S, 1]
    apart = v - (p * v).sum(1, keepdim=True)
    S = (p * apart).transpose(1, 2) @ k  # [H, D, D]
    weight = (p.square() * (apart @ M).mul_(apart)).sum((1, 2))
    return S.transpose(1, 2) @ M @ S, weight[:, None, None] * (q[:, :, None] * q[:, None, :])
