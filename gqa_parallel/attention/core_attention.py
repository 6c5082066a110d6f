"""softmax(Q K^T) V over groups of heads: the one place that picks a backend."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# S sequence, B micro-batch, N local query heads, G local KV heads, H head dim


class CoreAttention(nn.Module):
    """Causal attention of ``N`` query heads to ``G`` KV heads, ``N`` a multiple of ``G``.

    Args:
        softmax_scale: factor on the scores; None is ``1/sqrt(H)``.
        dropout: probability that an attention weight is dropped while training.
        dropout_rng: context in which dropout draws. Tensor-parallel ranks hold different heads, so they must draw
            from different streams.
    """

    def __init__(
        self,
        softmax_scale: float | None = None,
        dropout: float = 0.0,
        dropout_rng: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.dropout = dropout
        self.dropout_rng = dropout_rng

    def forward(self, q_SBNH: Tensor, k_SBGH: Tensor, v_SBGH: Tensor) -> Tensor:
        """
        Args:
            q_SBNH: queries; query head ``i`` attends to KV head ``i // (N/G)``.
            k_SBGH, v_SBGH: keys and values, as many positions as queries.
        Returns:
            [S, B, N * H], contiguous.
        """
        q_BNSH, k_BGSH, v_BGSH = (x.permute(1, 2, 0, 3) for x in (q_SBNH, k_SBGH, v_SBGH))
        heads_per_group = q_BNSH.shape[1] // k_BGSH.shape[1]
        if heads_per_group > 1 and q_BNSH.is_cuda and q_BNSH.dtype == torch.float32:
            # in fp32 no fused CUDA kernel takes grouped heads; the fallback would materialise S x S scores
            k_BGSH, v_BGSH = (x.repeat_interleave(heads_per_group, dim=1) for x in (k_BGSH, v_BGSH))
            heads_per_group = 1
        dropout = self.dropout if self.training else 0.0
        with self.dropout_rng() if dropout else contextlib.nullcontext():
            out_BNSH = F.scaled_dot_product_attention(
                q_BNSH,
                k_BGSH,
                v_BGSH,
                is_causal=True,
                dropout_p=dropout,
                scale=self.softmax_scale,
                enable_gqa=heads_per_group > 1,
            )
        return out_BNSH.permute(2, 0, 1, 3).flatten(2)
