"""The same attention as ``blocked_attention`` in one fused CUDA kernel, made by FlexAttention."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128


def flexible_attention(
    q_BNSH: Tensor,
    k_BGSH: Tensor,
    v_BGSH: Tensor,
    first_key_S: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """See ``blocked_attention``. No score leaves the kernel; blocks of keys that no query sees are skipped."""

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    out_BNSH, log_sum_BNS = _kernel(q_BNSH.is_cuda)(
        q_BNSH,
        k_BGSH,
        v_BGSH,
        score_mod=capped if softcap is not None else None,
        block_mask=block_mask(first_key_S),
        scale=scale,
        enable_gqa=q_BNSH.shape[1] != k_BGSH.shape[1],
        return_lse=True,
    )
    if sinks_N is None:
        return out_BNSH
    # a logit without a value takes its share of the weight: sum / (sum + exp(sink))
    share_BNS = (log_sum_BNS - sinks_N[:, None]).sigmoid()
    return out_BNSH * share_BNS[..., None].to(out_BNSH.dtype)


def block_mask(first_key_S: Tensor) -> BlockMask:
    """Which blocks of 128 x 128 scores are to be computed, and which of these need no mask.

    It follows from the first and last query of each block, so S x S decisions are never made.

    Args:
        first_key_S: the first key that each query sees, int64.
    """

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first_key_S[query]) & (key <= query)

    seq_len, device = len(first_key_S), first_key_S.device
    num_blocks = -(-seq_len // BLOCK)
    padding = num_blocks * BLOCK - seq_len
    first_keys = torch.cat((first_key_S, first_key_S[-1:].expand(padding))).view(num_blocks, BLOCK)
    key = BLOCK * torch.arange(num_blocks, device=device)  # the first of each block
    query = key[:, None]
    seen_by_some = (key + BLOCK > first_keys.amin(1, keepdim=True)) & (key < query + BLOCK)
    seen_by_all = (key >= first_keys.amax(1, keepdim=True)) & (key + BLOCK <= query + 1)
    return BlockMask.from_kv_blocks(
        *_listed(seen_by_some & ~seen_by_all),
        *_listed(seen_by_all),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(seq_len, seq_len),
    )


def _listed(chosen_QK: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row chooses, [1, 1, Q], and which, first in [1, 1, Q, K]; both int32."""
    order = chosen_QK.int().argsort(dim=1, descending=True, stable=True)
    return chosen_QK.sum(1).int()[None, None], order.int()[None, None]


@functools.cache
def _kernel(cuda: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """Compiled on CUDA; elsewhere written out with all scores, which serves to compare the two."""
    return torch.compile(flex_attention, dynamic=False) if cuda else flex_attention
