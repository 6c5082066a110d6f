"""Grouped-query attention written out, in one process: the oracle of the tests and the place to read it first."""

import math

import torch
from torch import Tensor, nn

from gqa_parallel.attention.rotary import rotate

# S sequence, B batch, D hidden, H head dim


class DenseGroupedQueryAttention(nn.Module):
    """Causal self-attention of ``num_heads`` query heads that share ``num_kv_heads`` KV heads (arXiv:2305.13245).

    Query head ``i`` reads KV head ``i // (num_heads / num_kv_heads)``. The scores are materialised, [B, heads, S, S].
    Weights are split, Hugging Face's way: ``q_proj`` [num_heads*H, D], ``k_proj`` and ``v_proj`` [num_kv_heads*H, D],
    ``o_proj`` [D, num_heads*H].
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
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=output_bias)
        has_norm = qk_norm_eps is not None
        self.q_norm = nn.RMSNorm(head_dim, eps=qk_norm_eps) if has_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, eps=qk_norm_eps) if has_norm else nn.Identity()

    def forward(self, hidden_SBD: Tensor, angles_SR: Tensor | None = None) -> Tensor:
        """
        Args:
            hidden_SBD: [S, B, D].
            angles_SR: rotary angles as in ``rotate``; None: no position embedding.
        Returns:
            [S, B, D].
        """
        q = self.q_norm(self.q_proj(hidden_SBD).unflatten(-1, (self.num_heads, self.head_dim)))
        k = self.k_norm(self.k_proj(hidden_SBD).unflatten(-1, (self.num_kv_heads, self.head_dim)))
        v = self.v_proj(hidden_SBD).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if angles_SR is not None:
            q, k = rotate(q, angles_SR), rotate(k, angles_SR)

        kv_head_of = torch.arange(self.num_heads, device=q.device) // (self.num_heads // self.num_kv_heads)
        k, v = k[:, :, kv_head_of], v[:, :, kv_head_of]

        scores = torch.einsum("sbnh,tbnh->bnst", q, k) / math.sqrt(self.head_dim)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
        out = torch.einsum("bnst,tbnh->sbnh", weights, v)
        return self.o_proj(out.flatten(2))
