"""The layer in Megatron's distributed checkpoints: one shard per head, so every partition reads every other's.

The stored tensors are Megatron's own: ``linear_qkv`` group-interleaved over all heads, ``linear_proj`` over all query
heads. Ranks that replicate a KV head store it once.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from gqa_parallel.partition.qkv_layout import block_map, megatron_layout, rank_layout

if TYPE_CHECKING:
    from gqa_parallel.megatron.self_attention import GQASelfAttention


def sharded_heads(
    layer: "GQASelfAttention", prefix: str, sharded_offsets: tuple, metadata: dict | None
) -> dict[str, Any]:
    """``layer.sharded_state_dict``: see Megatron's ``MegatronModule.sharded_state_dict`` for the arguments."""
    partition, tp_rank = layer.partition, layer.tp_rank
    dp_group = (metadata or {}).get("dp_cp_group")
    dp_rank = dp_group.rank() if dp_group is not None else 0
    replica = tp_rank - partition.kv_replica_ranks(tp_rank).start
    everything = megatron_layout(partition.num_heads, partition.num_kv_heads, layer.output_gate)

    def heads_of(key: str, data: Tensor, axis: int, indices: Sequence[int], total: int, copies: Sequence[int]):
        """A factory that cuts ``data`` along ``axis`` into heads: number ``indices[i]`` of ``total``."""

        def build(key: str, tensor: Tensor, replica_id: Any, flattened_range: Any) -> list[ShardedTensor]:
            return [
                ShardedTensor.from_rank_offsets(
                    key,
                    head.contiguous(),
                    *sharded_offsets,
                    (axis + len(sharded_offsets), index, total),
                    replica_id=(0, copy, dp_rank),
                    prepend_axis_num=len(sharded_offsets),
                )
                for head, index, copy in zip(tensor.chunk(len(indices), dim=axis), indices, copies, strict=True)
            ]

        def merge(heads: list[Tensor]) -> Tensor:
            return torch.cat(heads, dim=axis)

        return ShardedTensorFactory(key, data, build, merge)

    state: dict[str, Any] = {}
    blocks = rank_layout(partition, tp_rank, layer.output_gate)
    linears = {"linear_q": blocks[:-2], "linear_kv": blocks[-2:]} if partition.replicates_kv else {"linear_qkv": blocks}
    for linear, its_blocks in linears.items():
        indices = block_map(everything, its_blocks)
        copies = [replica if kind in "kv" else 0 for kind, _ in its_blocks]
        for name, parameter in getattr(layer, linear).named_parameters():
            stored_key = f"{prefix}linear_qkv.{name}"
            state[f"{prefix}{linear}.{name}"] = heads_of(
                stored_key, parameter.data, 0, indices, len(everything), copies
            )
    query_heads = partition.query_heads(tp_rank)
    state[f"{prefix}linear_proj.weight"] = heads_of(
        f"{prefix}linear_proj.weight",
        layer.linear_proj.weight.data,
        1,
        query_heads,
        partition.num_heads,
        [0] * len(query_heads),
    )
    if layer.core_attention.softmax_offset is not None:
        key = f"{prefix}core_attention.softmax_offset"
        data = layer.core_attention.softmax_offset.data
        state[key] = heads_of(key, data, 0, query_heads, partition.num_heads, [0] * len(query_heads))
    replicated = {
        name: parameter.data
        for name, parameter in layer.named_parameters()
        if name == "linear_proj.bias" or "layernorm" in name
    }
    state.update(
        make_sharded_tensors_for_checkpoint(
            replicated, prefix, {}, sharded_offsets, tp_group=layer.tp_group, dp_cp_group=dp_group
        )
    )
    return state
