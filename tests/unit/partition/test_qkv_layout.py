"""QKV row layouts against the reshapes that Megatron-Core and Hugging Face apply to their activations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa_parallel.partition.heads import HeadPartition
from gqa_parallel.partition.qkv_layout import (
    block_map,
    huggingface_layout,
    megatron_layout,
    rank_layout,
    row_map,
)
from tests.unit.partition.test_heads import partitions

HEAD_DIM = 3


def huggingface_rows(num_heads: int, num_kv_heads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row numbers of ``cat(q_proj, k_proj, v_proj)``, each as [heads, head_dim]."""
    rows = np.arange((num_heads + 2 * num_kv_heads) * HEAD_DIM)
    q, k, v = np.split(rows, np.cumsum([num_heads * HEAD_DIM, num_kv_heads * HEAD_DIM]))
    return tuple(part.reshape(-1, HEAD_DIM) for part in (q, k, v))


@given(st.integers(1, 7), st.integers(1, 5))
def test_megatron_layout_is_megatrons_reshape(num_kv_heads, heads_per_group):
    """``SelfAttention.get_query_key_value_tensors`` reads its rows as [ng, np/ng + 2, hn]."""
    num_heads = num_kv_heads * heads_per_group
    megatron_rows = np.array(
        row_map(huggingface_layout(num_heads, num_kv_heads), megatron_layout(num_heads, num_kv_heads), HEAD_DIM)
    )
    groups = megatron_rows.reshape(num_kv_heads, heads_per_group + 2, HEAD_DIM)
    q, k, v = huggingface_rows(num_heads, num_kv_heads)
    np.testing.assert_array_equal(groups[:, :-2].reshape(num_heads, HEAD_DIM), q)
    np.testing.assert_array_equal(groups[:, -2], k)
    np.testing.assert_array_equal(groups[:, -1], v)


@given(st.integers(1, 7), st.integers(1, 5))
def test_layouts_invert(num_kv_heads, heads_per_group):
    sizes = (num_kv_heads * heads_per_group, num_kv_heads)
    there = row_map(megatron_layout(*sizes), huggingface_layout(*sizes), HEAD_DIM)
    back = row_map(huggingface_layout(*sizes), megatron_layout(*sizes), HEAD_DIM)
    rows = np.arange(len(there))
    np.testing.assert_array_equal(rows[there][back], rows)
    np.testing.assert_array_equal(rows[back][there], rows)


@given(partitions())
def test_every_block_comes_back_from_the_ranks(partition):
    """Also where KV heads are replicated: the full weight is some rank's block each."""
    full = megatron_layout(partition.num_heads, partition.num_kv_heads)
    stacked = [block for rank in range(partition.tp_size) for block in rank_layout(partition, rank)]
    assert [stacked[place] for place in block_map(stacked, full)] == full
    assert set(stacked) == set(full)


@given(partitions())
def test_a_rank_stores_its_heads_once(partition):
    for rank in range(partition.tp_size):
        blocks = rank_layout(partition, rank)
        assert len(set(blocks)) == len(blocks)
        assert [head for kind, head in blocks if kind == "q"] == list(partition.query_heads(rank))
        for kind in "kv":
            assert [head for k, head in blocks if k == kind] == list(partition.kv_heads(rank))


@pytest.mark.parametrize("sizes", [(4, 4, 2), (12, 6, 3), (10, 5, 5), (8, 2, 1)])
def test_ranks_slice_megatrons_layout_where_tp_divides_the_kv_heads(sizes):
    partition = HeadPartition(*sizes)
    stacked = [block for rank in range(partition.tp_size) for block in rank_layout(partition, rank)]
    full = megatron_layout(partition.num_heads, partition.num_kv_heads)
    assert stacked == full
    assert len({len(rank_layout(partition, rank)) for rank in range(partition.tp_size)}) == 1


def test_a_replicated_rank_by_hand():
    partition = HeadPartition(num_heads=6, num_kv_heads=2, tp_size=4)
    assert rank_layout(partition, 0) == [("q", 0), ("q", 1), ("k", 0), ("v", 0)]
    assert rank_layout(partition, 1) == [("q", 2), ("k", 0), ("v", 0)]
    assert rank_layout(partition, 2) == [("q", 3), ("q", 4), ("k", 1), ("v", 1)]
    full = megatron_layout(6, 2)  # q0 q1 q2 k0 v0 q3 q4 q5 k1 v1
    assert block_map(full, rank_layout(partition, 1)) == [2, 3, 4]
    assert row_map(full, rank_layout(partition, 1), head_dim=2) == [4, 5, 6, 7, 8, 9]


def test_huggingface_layout_by_hand():
    assert huggingface_layout(2, 1) == [("q", 0), ("q", 1), ("k", 0), ("v", 0)]


def test_a_missing_block_is_an_error():
    with pytest.raises(KeyError):
        block_map(rank_layout(HeadPartition(4, 2, 2), 0), megatron_layout(4, 2))
