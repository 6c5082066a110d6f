"""softmax(Q K^T) V over groups of heads: the one place that picks a backend."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gqa_parallel.attention.blocked import blocked_attention
from gqa_parallel.attention.flexible import flexible_attention

# S sequence, B micro-batch, N local query heads, G local KV heads, H head dim


class CoreAttention(nn.Module):
    """Causal attention of ``N`` query heads to ``G`` KV heads, ``N`` a multiple of ``G``.

    Args:
        softmax_scale: factor on the scores; None is ``1/sqrt(H)``.
        dropout: probability that an attention weight is dropped while training.
        dropout_rng: context in which dropout draws. Tensor-parallel ranks hold different heads, so they must draw
            from different streams.
        window: keys that a query sees, itself included; None: all before it (Mistral, arXiv:2310.06825).
        softcap: largest score, approached by tanh; None: none (Gemma 2, arXiv:2408.00118).
        num_sinks: ``N``, to learn for each query head a logit that takes attention from all keys, ``softmax_offset``;
            0: none (gpt-oss, arXiv:2508.10925).

    Plain attention runs in torch's fused kernel, which on the CPU has no dropout. For the rest, FlexAttention on CUDA
    (without dropout) and blocks of queries elsewhere. None holds S x S scores.
    """

    def __init__(
        self,
        softmax_scale: float | None = None,
        dropout: float = 0.0,
        dropout_rng: Callable[[], AbstractContextManager] = contextlib.nullcontext,
        window: int | None = None,
        softcap: float | None = None,
        num_sinks: int = 0,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.dropout = dropout
        self.dropout_rng = dropout_rng
        self.window = window
        self.softcap = softcap
        self.softmax_offset = nn.Parameter(torch.zeros(num_sinks)) if num_sinks else None

    def forward(self, q_SBNH: Tensor, k_SBGH: Tensor, v_SBGH: Tensor, document_start_S: Tensor | None = None) -> Tensor:
        """
        Args:
            q_SBNH: queries; query head ``i`` attends to KV head ``i // (N/G)``.
            k_SBGH, v_SBGH: keys and values, as many positions as queries.
            document_start_S: where each position's document begins, int64: no attention before it; None: one document.
        Returns:
            [S, B, N * H], contiguous.
        """
        q_BNSH, k_BGSH, v_BGSH = (x.permute(1, 2, 0, 3) for x in (q_SBNH, k_SBGH, v_SBGH))
        first_key_S = self.first_keys(len(q_SBNH), q_SBNH.device, document_start_S)
        dropout = self.dropout if self.training else 0.0
        with self.dropout_rng() if dropout else contextlib.nullcontext():
            is_plain = first_key_S is None and self.softcap is None and self.softmax_offset is None
            if is_plain and (q_SBNH.is_cuda or not dropout):
                out_BNSH = self._fused(q_BNSH, k_BGSH, v_BGSH, dropout)
            else:
                if first_key_S is None:
                    first_key_S = torch.zeros(len(q_SBNH), dtype=torch.int64, device=q_SBNH.device)
                scale = self.softmax_scale if self.softmax_scale is not None else q_SBNH.shape[-1] ** -0.5
                variant = {"scale": scale, "softcap": self.softcap, "sinks_N": self.softmax_offset}
                if q_SBNH.is_cuda and not dropout:
                    out_BNSH = flexible_attention(q_BNSH, k_BGSH, v_BGSH, first_key_S, **variant)
                else:
                    out_BNSH = blocked_attention(q_BNSH, k_BGSH, v_BGSH, first_key_S, **variant, dropout=dropout)
        return out_BNSH.permute(2, 0, 1, 3).flatten(2)

    def first_keys(self, seq_len: int, device: torch.device, document_start_S: Tensor | None) -> Tensor | None:
        """The first key that each query sees, [S] int64; None: the first of all."""
        if self.window is None or self.window >= seq_len:
            return document_start_S
        window_start_S = (torch.arange(seq_len, device=device) - (self.window - 1)).clamp(min=0)
        return window_start_S if document_start_S is None else torch.maximum(window_start_S, document_start_S)

    def _fused(self, q_BNSH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, dropout: float) -> Tensor:
        heads_per_group = q_BNSH.shape[1] // k_BGSH.shape[1]
        if heads_per_group > 1 and q_BNSH.is_cuda and q_BNSH.dtype == torch.float32:
            # in fp32 no fused CUDA kernel takes grouped heads; the fallback would materialise S x S scores
            k_BGSH, v_BGSH = (x.repeat_interleave(heads_per_group, dim=1) for x in (k_BGSH, v_BGSH))
            heads_per_group = 1
        return F.scaled_dot_product_attention(
            q_BNSH,
            k_BGSH,
            v_BGSH,
            is_causal=True,
            dropout_p=dropout,
            scale=self.softmax_scale,
            enable_gqa=heads_per_group > 1,
        )
