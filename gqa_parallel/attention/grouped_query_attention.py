"""The tensor-parallel grouped-query attention layer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from gqa_parallel.attention.rotary import Rotation
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
        output_gate: the projections also give a gate per query head, (2N + 2G) * H and 2N * H wide; the sigmoid of
            it multiplies the head's output.
        gather_input: the copy or sequence gather in front of ``linear_q`` and ``linear_kv``.
        core_attention: (q, k, v) -> [S, B, N * H].
        linear_proj: [S, B, N * H] -> [S, B, D], summed over the ranks.
        q_layernorm, k_layernorm: QK-norm over ``H``, or None.
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
        output_gate: bool = False,
        tp_group: ProcessGroup,
        kv_replica_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.partition = partition
        self.tp_rank = tp_rank
        self.head_dim = head_dim
        self.num_local_heads = len(partition.query_heads(tp_rank))
        self.num_local_kv_heads = len(partition.kv_heads(tp_rank))
        self.output_gate = output_gate
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

    def forward(
        self, hidden_SBD: Tensor, rotation: Rotation | None = None, document_start_S: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            hidden_SBD: [S, B, D], equal on all ranks; under sequence parallelism this rank's S / T positions.
            rotation: of the whole sequence's positions; None: no position embedding.
            document_start_S: where each position's document begins, int64; None: one document.
        Returns:
            [S, B, D] in the same arrangement, and the output projection's bias if it is left to the caller.
        """
        q_SBNH, gate_SBNH, k_SBGH, v_SBGH = self.project(hidden_SBD)
        if self.q_layernorm is not None:
            q_SBNH = self.q_layernorm(q_SBNH)
        if self.k_layernorm is not None:
            k_SBGH = self.k_layernorm(k_SBGH)
        if rotation is not None:
            q_SBNH, k_SBGH = rotation(q_SBNH), rotation(k_SBGH)
        out = self.core_attention(q_SBNH, k_SBGH, v_SBGH, document_start_S)
        if gate_SBNH is not None:
            gate = gate_SBNH.flatten(2).to(torch.promote_types(gate_SBNH.dtype, torch.float32)).sigmoid()
            out = (out * gate).to(out.dtype)
        return self.linear_proj(out)

    def project(self, hidden_SBD: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Queries [S, B, N, H], their gates or None, keys and values [S, B, G, H] of this rank's heads."""
        per_group = self.num_local_heads // self.num_local_kv_heads
        queries = [per_group, per_group] if self.output_gate else [per_group]
        if self.partition.replicates_kv:
            hidden_SBD = self.gather_input(hidden_SBD)
            q, _ = self.linear_q(hidden_SBD)
            kv, _ = self.linear_kv(hidden_SBD)
            q_parts = q.unflatten(-1, (1, -1, self.head_dim)).split(queries, dim=3)
            k_SBG1H, v_SBG1H = kv.unflatten(-1, (1, 2, self.head_dim)).split((1, 1), dim=3)
        else:
            qkv, _ = self.linear_qkv(hidden_SBD)
            groups = qkv.unflatten(-1, (self.num_local_kv_heads, -1, self.head_dim))
            *q_parts, k_SBG1H, v_SBG1H = groups.split((*queries, 1, 1), dim=3)
        q_SBNH, *gate_SBNH = (part.flatten(2, 3) for part in q_parts)
        return q_SBNH, gate_SBNH[0] if gate_SBNH else None, k_SBG1H.squeeze(3), v_SBG1H.squeeze(3)
