"""In which order the rows of a QKV weight stand: Megatron's, Hugging Face's, and a rank's own.

A QKV weight is a stack of *blocks*, each the ``head_dim`` rows of one head: ``("q", i)``, ``("k", j)``, ``("v", j)``,
and with an output gate ``("g", i)``. A layout is the list of its blocks; moving between layouts is looking blocks up.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

from gqa_parallel.partition.heads import HeadPartition

Block = tuple[Literal["q", "g", "k", "v"], int]


def megatron_layout(num_heads: int, num_kv_heads: int, gated: bool = False) -> list[Block]:
    """Group-interleaved: the query heads of a group, their gates, its K head, its V head; then the next group."""
    return rank_layout(HeadPartition(num_heads, num_kv_heads, tp_size=1), rank=0, gated=gated)


def huggingface_layout(num_heads: int, num_kv_heads: int) -> list[Block]:
    """Split: ``q_proj``, ``k_proj`` and ``v_proj`` one below the other."""
    return [
        *(("q", head) for head in range(num_heads)),
        *(("k", head) for head in range(num_kv_heads)),
        *(("v", head) for head in range(num_kv_heads)),
    ]


def rank_layout(partition: HeadPartition, rank: int, gated: bool = False) -> list[Block]:
    """Group-interleaved over the heads of ``rank``; where no head is replicated, its slice of Megatron's layout."""
    query_heads = partition.query_heads(rank)
    blocks: list[Block] = []
    for kv_head in partition.kv_heads(rank):
        first = kv_head * partition.heads_per_group
        group = range(first, first + partition.heads_per_group)
        local = [head for head in group if head in query_heads]
        blocks += [("q", head) for head in local]
        blocks += [("g", head) for head in local if gated]
        blocks += [("k", kv_head), ("v", kv_head)]
    return blocks


def block_map(source: Sequence[Block], target: Iterable[Block]) -> list[int]:
    """For each block of ``target``, its place in ``source``.

    ``target_weight = source_weight.unflatten(0, (-1, head_dim))[block_map(source, target)].flatten(0, 1)``

    Raises:
        KeyError: ``source`` lacks a block of ``target``.
    """
    place = {block: index for index, block in enumerate(source)}
    return [place[block] for block in target]


def row_map(source: Sequence[Block], target: Iterable[Block], head_dim: int) -> list[int]:
    """``block_map`` row by row: ``target_weight = source_weight[row_map(source, target, head_dim)]``."""
    return [block * head_dim + row for block in block_map(source, target) for row in range(head_dim)]
