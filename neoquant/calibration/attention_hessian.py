"""Output-side Hessians of q_proj, k_proj and v_proj: how much their errors change the output of attention.

A layer's own output is the wrong place to measure the error of q, k and v: an error in a query counts where keys
differ, one in a value as far as out_proj passes it on. To first order, the squared error that one of the three layers
causes behind out_proj is, for each head, tr(K D H Dᵀ) with the layer's error D[size, C], the Hessian H of its inputs
and a matrix K[size, size], the output-side Hessian. The first-order terms, for the attention weights p of a query, the
keys k, the values v, their mean o under p, and the head's part W of out_proj, with M = Wᵀ W:

    q    an error d in the query changes the output by W S d, S = sum_j p_j (v_j - o) k_jᵀ:  K = mean of Sᵀ M S
    k    an error d_j in a key changes it by W p_j (v_j - o) (q . d_j):  K = mean of sum_j p_j² |W (v_j - o)|² q qᵀ
    v    K = M

K and H are averaged separately, as in Kronecker-factored curvature (Martens & Grosse, arXiv:1503.05671); no backward
pass is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from neoquant.model.gpt_neo import SelfAttention
from neoquant.model.transfers import to_device

POSITIONS = 512  # queries that are looked at; twice as many change little
LEAST = 32  # of them in a row that is looked at at all


def attention_hessians(
    attention: SelfAttention, inputs: Iterable[Tensor], rows: int, numbers: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """K of q_proj, k_proj and v_proj, float32[heads, size, size] each; those of q and k are sums over the inputs.

    Args:
        attention: with its weights as they were before quantization.
        inputs: what it sees, float32[B, T, C] piece by piece, `rows` in all.
        rows: see `inputs`.
        numbers: of those of the rows, ascending, that `inputs` holds, where it does not hold all; the sums of several
            processes add up to that of one.
    """
    heads = attention.num_heads
    out = attention.out_proj.weight.detach().float()
    W = out.view(len(out), heads, -1).transpose(0, 1)  # [H, C, D]
    M = W.transpose(1, 2) @ W
    K_q, K_k = torch.zeros_like(M), torch.zeros_like(M)
    random = torch.Generator().manual_seed(0)
    every = max(1, rows * LEAST // POSITIONS)  # row; so many queries of a row are worth its keys and values
    count = max(LEAST, POSITIONS // rows)
    drawn = 0  # how often for rows up to this one, whoever looks at them
    for number, x in zip(
        range(rows) if numbers is None else numbers, (x for piece in inputs for x in piece), strict=True
    ):
        if number % every:
            continue
        while drawn <= number // every:
            positions = torch.randperm(len(x), generator=random)[:count]
            drawn += 1
        k, v = (
            proj(x).view(len(x), heads, -1).transpose(0, 1).contiguous()  # [H, T, D]
            for proj in (attention.k_proj, attention.v_proj)
        )
        q = attention.q_proj(x[to_device(positions, x.device)]).view(len(positions), heads, -1).transpose(0, 1)
        sizes = (v @ M).mul_(v).sum(2)  # |W v|², [H, T]
        for i, position in enumerate(positions.tolist()):
            visible = slice(max(0, position + 1 - attention.window_size) if attention.local else 0, position + 1)
            of_q, of_k = _one_query(q[:, i, :, None], k[:, visible], v[:, visible], sizes[:, visible], M)
            K_q += of_q
            K_k += of_k
    return {"q_proj": K_q, "k_proj": K_k, "v_proj": M}


def _one_query(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor, M: Tensor) -> tuple[Tensor, Tensor]:
    """What one query adds to K of q_proj and of k_proj: q[H, D, 1], k and v [H, S, D], |W v|² [H, S], M[H, D, D]."""
    p = (k @ q).squeeze(2).softmax(1)  # [H, S]
    weighted = p[:, :, None] * v
    o, k_mean = weighted.sum(1, keepdim=True), p[:, None] @ k  # [H, 1, D]
    S = (weighted.transpose(1, 2) @ k).sub_(o.transpose(1, 2) @ k_mean)
    projected = o @ M
    deviation = sizes - 2 * (v @ projected.transpose(1, 2)).squeeze(2) + (projected * o).sum(2)  # |W (v - o)|², [H, S]
    weight = (p.square() * deviation.clamp_(min=0)).sum(1)
    return S.transpose(1, 2) @ M @ S, weight[:, None, None] * (q @ q.transpose(1, 2))
