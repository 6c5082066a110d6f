"""The same attention as ``blocked_attention`` in one fused CUDA kernel, made by FlexAttention."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


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

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first_key_S[query]) & (key <= query)

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    seq_len = len(first_key_S)
    mask = create_block_mask(visible, B=None, H=None, Q_LEN=seq_len, KV_LEN=seq_len, device=q_BNSH.device)
    out_BNSH, log_sum_BNS = _kernel(q_BNSH.is_cuda)(
        q_BNSH,
        k_BGSH,
        v_BGSH,
        score_mod=capped if softcap is not None else None,
        block_mask=mask,
        scale=scale,
        enable_gqa=q_BNSH.shape[1] != k_BGSH.shape[1],
        return_lse=True,
    )
    if sinks_N is None:
        return out_BNSH
    # a logit without a value takes its share of the weight: sum / (sum + exp(sink))
    share_BNS = (log_sum_BNS - sinks_N[:, None]).sigmoid()
    return out_BNSH * share_BNS[..., None].to(out_BNSH.dtype)


@functools.cache
def _kernel(cuda: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """Compiled on CUDA; elsewhere written out with all scores, which serves to compare the two."""
    return torch.compile(flex_attention, dynamic=False) if cuda else flex_attention
