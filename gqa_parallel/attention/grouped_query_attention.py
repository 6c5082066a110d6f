"""The tensor-parallel grouped-query attention layer."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from gqa_parallel.attention.rotary import rotate
from gqa_parallel.attention.shared_parameters import share
from gqa_parallel.partition.heads import HeadPartition

# S sequence, B micro-batch, D hidden, N local query heads, G local KV heads, H head dim, R rotary dim


class GroupedQueryAttention(nn.Module):
    """Self-attention whose query and KV heads are spread over tensor-parallel ranks by a ``HeadPartition``.

    MHA (``num_kv_heads == num_heads``) and MQA (``num_kv_heads == 1``) are the same layer. A rank computes its own
    heads from whole KV heads, so no activation crosses ranks inside: the input is copied (or, under sequence
    parallelism, gathered) once before the projections, and the output projection sums over the ranks.

    Args:
        partition: which heads this rank holds.
        tp_rank: this rank in ``tp_group``.
        head_dim: components of a head.
        linear_qkv: where no KV head is replicated: [S, B, D] -> [S, B, (N + 2G) * H], group-interleaved as in
            ``rank_layout``; it brings its own input collective (Megatron's ``ColumnParallelLinear``).
        linear_q, linear_kv: where KV heads are replicated, instead of ``linear_qkv``: [S, B, D] -> [S, B, N * H] and
            [S, B, 2 * H], K above V. They are local; ``gather_input`` is their shared collective.
        gather_input: the copy or sequence gather in front of ``linear_q`` and ``linear_kv``.
        core_attention: (q, k, v) -> [S, B, N * H].
        linear_proj: [S, B, N * H] -> [S, B, D], summed over the ranks.
        q_layernorm, k_layernorm: QK-norm over ``H``, or None.
        rotary_interleaved: as in ``rotate``.
        tp_group: the tensor-parallel ranks; they share the QK-norm weights.
        kv_replica_group: the ranks that share ``linear_kv``.

    Every linear returns ``(output, bias or None)``, Megatron's convention.

    Communication, forward and backward: two all-reduces of [S, B, D] (sequence parallel: all-gather and
    reduce-scatter pairs). ``sum_shared_gradients`` adds, per backward pass, the sum of ``linear_kv``'s weight gradient
    over its replicas, and of the QK-norm weights' over ``tp_group``.

    Source: arXiv:2305.13245 (GQA), arXiv:1909.08053 section 3 (tensor parallelism).
    """

    def __init__(
        self,
        *,
        partition: HeadPartition,
        tp_rank: int,
        head_dim: int,
        core_attention: nn.Module,
        linear_proj: nn.Module,
        linear_qkv: nn.Module | None = None,
        linear_q: nn.Module | None = None,
        linear_kv: nn.Module | None = None,
        gather_input: Callable[[Tensor], Tensor] | None = None,
        q_layernorm: nn.Module | None = None,
        k_layernorm: nn.Module | None = None,
        rotary_interleaved: bool = False,
        tp_group: ProcessGroup,
        kv_replica_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.partition = partition
        self.tp_rank = tp_rank
        self.head_dim = head_dim
        self.num_local_heads = len(partition.query_heads(tp_rank))
        self.num_local_kv_heads = len(partition.kv_heads(tp_rank))
        self.rotary_interleaved = rotary_interleaved
        if partition.replicates_kv:
            self.linear_q, self.linear_kv, self.gather_input = linear_q, linear_kv, gather_input
            share(linear_kv, kv_replica_group)
        else:
            self.linear_qkv = linear_qkv
        self.q_layernorm = q_layernorm
        self.k_layernorm = k_layernorm
        share(q_layernorm, tp_group)
        share(k_layernorm, tp_group)
        self.core_attention = core_attention
        self.linear_proj = linear_proj

    def forward(self, hidden_SBD: Tensor, angles_SR: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            hidden_SBD: [S, B, D], equal on all ranks; under sequence parallelism this rank's S / T positions.
            angles_SR: [S, R] rotary angles of the whole sequence; None: no position embedding.
        Returns:
            [S, B, D] in the same arrangement, and the output projection's bias if it is left to the caller.
        """
        q_SBNH, k_SBGH, v_SBGH = self.project(hidden_SBD)
        if self.q_layernorm is not None:
            q_SBNH = self.q_layernorm(q_SBNH)
        if self.k_layernorm is not None:
            k_SBGH = self.k_layernorm(k_SBGH)
        if angles_SR is not None:
            q_SBNH = rotate(q_SBNH, angles_SR, self.rotary_interleaved)
            k_SBGH = rotate(k_SBGH, angles_SR, self.rotary_interleaved)
        return self.linear_proj(self.core_attention(q_SBNH, k_SBGH, v_SBGH))

    def project(self, hidden_SBD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [S, B, N, H], keys and values [S, B, G, H] of this rank's heads."""
        if self.partition.replicates_kv:
            hidden_SBD = self.gather_input(hidden_SBD)
            q, _ = self.linear_q(hidden_SBD)
            kv, _ = self.linear_kv(hidden_SBD)
            k_SBGH, v_SBGH = kv.unflatten(-1, (2, 1, self.head_dim)).unbind(2)
            return q.unflatten(-1, (self.num_local_heads, self.head_dim)), k_SBGH, v_SBGH
        qkv, _ = self.linear_qkv(hidden_SBD)
        per_group = self.num_local_heads // self.num_local_kv_heads
        groups = qkv.unflatten(-1, (self.num_local_kv_heads, per_group + 2, self.head_dim))
        q_SBGRH, k_SBG1H, v_SBG1H = groups.split((per_group, 1, 1), dim=3)
        return q_SBGRH.flatten(2, 3), k_SBG1H.squeeze(3), v_SBG1H.squeeze(3)
