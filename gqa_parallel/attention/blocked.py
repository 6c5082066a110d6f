"""Attention over blocks of queries, for what no fused kernel does: memory linear in the sequence length."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# S sequence, B micro-batch, N local query heads, G local KV heads, R = N / G, H head dim, Q rows of a block, L its keys

BLOCK = 128


def blocked_attention(
    q_BNSH: Tensor,
    k_BGSH: Tensor,
    v_BGSH: Tensor,
    first_key_S: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks_N: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Each query ``i`` attends to the keys ``first_key_S[i]`` to ``i``.

    A block's scores exist only while the block is computed: the backward pass computes them again. Peak memory is that
    of the inputs and of one block, [B, N, 128, L], with L at most S, or window + 128.

    Args:
        q_BNSH, k_BGSH, v_BGSH: queries, keys, values; query head ``n`` reads KV head ``n // R``.
        first_key_S: the first key that each query sees, int64, not above its own position.
        scale: factor on the scores.
        softcap: ``c * tanh(score / c)`` in place of the score (Gemma 2, arXiv:2408.00118).
        sinks_N: a logit per query head that takes part in the softmax and has no value (gpt-oss, arXiv:2508.10925).
        dropout: probability that a weight is dropped.
    Returns:
        [B, N, S, H], in the inputs' dtype; scores and softmax are fp32 at least.
    """
    first_keys = first_key_S.tolist()
    out = []
    for start in range(0, len(first_keys), BLOCK):
        stop = min(start + BLOCK, len(first_keys))
        begin = min(first_keys[start:stop])
        out.append(
            checkpoint(
                _one_block,
                q_BNSH[:, :, start:stop],
                k_BGSH[:, :, begin:stop],
                v_BGSH[:, :, begin:stop],
                first_key_S[start:stop],
                start,
                begin,
                sinks_N,
                scale,
                softcap,
                dropout,
                use_reentrant=False,
                preserve_rng_state=dropout > 0,
            )
        )
    return torch.cat(out, dim=2)


def _one_block(
    q_BNQH: Tensor,
    k_BGLH: Tensor,
    v_BGLH: Tensor,
    first_key_Q: Tensor,
    start: int,
    begin: int,
    sinks_N: Tensor | None,
    scale: float,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    num_kv_heads = k_BGLH.shape[1]
    q_BGRQH = q_BNQH.unflatten(1, (num_kv_heads, -1))
    # the queries of a group are rows of one product, so that its keys are read once
    scores = q_BGRQH.flatten(2, 3) @ k_BGLH.transpose(-1, -2)
    scores_BGRQL = scores.unflatten(2, q_BGRQH.shape[2:4]).to(torch.promote_types(scores.dtype, torch.float32)) * scale
    if softcap is not None:
        scores_BGRQL = softcap * (scores_BGRQL / softcap).tanh()
    scores_BGRQL = scores_BGRQL.masked_fill(~_visible(first_key_Q, start, begin), -torch.inf)
    if sinks_N is not None:
        sinks = sinks_N.to(scores_BGRQL.dtype).view(1, num_kv_heads, -1, 1, 1).expand(*scores_BGRQL.shape[:-1], 1)
        weights = torch.cat((scores_BGRQL, sinks), dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores_BGRQL.softmax(dim=-1)
    weights = F.dropout(weights, dropout).to(v_BGLH.dtype)
    out = weights.flatten(2, 3) @ v_BGLH
    return out.unflatten(2, q_BGRQH.shape[2:4]).flatten(1, 2)


def _visible(first_key_Q: Tensor, start: int, begin: int) -> Tensor:
    """[Q, L]: whether query ``start + row`` sees key ``begin + column``."""
    stop, device = start + len(first_key_Q), first_key_Q.device
    query_Q1 = torch.arange(start, stop, device=device)[:, None]
    key_L = torch.arange(begin, stop, device=device)
    return (key_L >= first_key_Q[:, None]) & (key_L <= query_Q1)
