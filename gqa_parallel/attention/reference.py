"""Grouped-query attention written out, in one process: the oracle of the tests and the place to read it first."""

import math

import torch
from torch import Tensor, nn

from gqa_parallel.attention.rotary import Rotation

# S sequence, B batch, D hidden, N query heads, H head dim


class DenseGroupedQueryAttention(nn.Module):
    """Causal self-attention of ``num_heads`` query heads that share ``num_kv_heads`` KV heads (arXiv:2305.13245).

    Query head ``i`` reads KV head ``i // (num_heads / num_kv_heads)``. The scores are materialised, [B, N, S, S].
    Weights are split, Hugging Face's way: ``q_proj`` [N*H, D], ``k_proj`` and ``v_proj`` [num_kv_heads*H, D],
    ``o_proj`` [D, N*H]; ``g_proj`` [N*H, D] with an output gate.

    Args:
        qk_norm_eps: None: no QK-norm.
        window, softcap, softmax_scale: as in ``CoreAttention``.
        sinks: learn a logit per query head that takes attention from all keys.
        output_gate: multiply each head's output by the sigmoid of a projection of its own.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm_eps: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        softmax_scale: float | None = None,
        sinks: bool = False,
        output_gate: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.window, self.softcap = window, softcap
        self.softmax_scale = softmax_scale or 1 / math.sqrt(head_dim)
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias)
        self.g_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=qkv_bias) if output_gate else None
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=output_bias)
        has_norm = qk_norm_eps is not None
        self.q_norm = nn.RMSNorm(head_dim, eps=qk_norm_eps) if has_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, eps=qk_norm_eps) if has_norm else nn.Identity()
        self.sinks = nn.Parameter(torch.zeros(num_heads)) if sinks else None

    def forward(
        self, hidden_SBD: Tensor, rotation: Rotation | None = None, document_start_S: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            hidden_SBD: [S, B, D].
            rotation: of the positions; None: no position embedding.
            document_start_S: where each position's document begins; None: one document.
        Returns:
            [S, B, D].
        """
        q = self.q_norm(self.q_proj(hidden_SBD).unflatten(-1, (self.num_heads, self.head_dim)))
        k = self.k_norm(self.k_proj(hidden_SBD).unflatten(-1, (self.num_kv_heads, self.head_dim)))
        v = self.v_proj(hidden_SBD).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if rotation is not None:
            q, k = rotation(q), rotation(k)

        kv_head_of = torch.arange(self.num_heads, device=q.device) // (self.num_heads // self.num_kv_heads)
        k, v = k[:, :, kv_head_of], v[:, :, kv_head_of]

        scores_BNSS = torch.einsum("sbnh,tbnh->bnst", q, k) * self.softmax_scale
        if self.softcap is not None:
            scores_BNSS = self.softcap * torch.tanh(scores_BNSS / self.softcap)
        scores_BNSS = scores_BNSS.masked_fill(~self._visible(len(q), document_start_S, q.device), -torch.inf)
        weights_BNSS = self._softmax(scores_BNSS)
        out_SBNH = torch.einsum("bnst,tbnh->sbnh", weights_BNSS, v)
        out = out_SBNH.flatten(2)
        if self.g_proj is not None:
            out = out * torch.sigmoid(self.g_proj(hidden_SBD))
        return self.o_proj(out)

    def _visible(self, seq_len: int, document_start_S: Tensor | None, device: torch.device) -> Tensor:
        """[S, S]: whether query (row) sees key (column)."""
        query = torch.arange(seq_len, device=device)[:, None]
        key = torch.arange(seq_len, device=device)
        visible = key <= query
        if self.window is not None:
            visible = visible & (query - key < self.window)
        if document_start_S is not None:
            visible = visible & (document_start_S[:, None] == document_start_S)
        return visible

    def _softmax(self, scores_BNSS: Tensor) -> Tensor:
        if self.sinks is None:
            return scores_BNSS.softmax(dim=-1)
        sinks = self.sinks[:, None, None].expand(*scores_BNSS.shape[:-1], 1)
        return torch.cat((sinks, scores_BNSS), dim=-1).softmax(dim=-1)[..., 1:]
