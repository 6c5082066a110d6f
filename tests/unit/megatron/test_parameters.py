from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gqa_parallel.megatron.parameters import Sharding, _of_even_shares, _of_heads
from gqa_parallel.partition.heads import HeadPartition


def indices_of(sharding: Sharding, rank: int) -> list[int]:
    return [index for piece in sharding.pieces[rank] for index in piece]


def assert_owned_once(sharding: Sharding) -> None:
    owners = [index for rank in range(len(sharding.pieces)) for piece in sharding.owned(rank) for index in piece]
    assert sorted(owners) == list(range(sharding.shape[sharding.dim]))


def assert_slices_restore(sharding: Sharding) -> None:
    full = torch.randn(sharding.shape)
    restored = torch.full_like(full, torch.nan)
    for rank in range(len(sharding.pieces)):
        part = sharding.slice(full, rank)
        assert part.shape == sharding.local_shape(rank)
        sharding.place(part, restored, rank)
    assert torch.equal(restored, full)


def test_column_parallel():
    sharding = _of_even_shares("w", (3, 7), dim=0, tp_size=2, num_stacked=1, num_rows=None)
    assert sharding.shape == (6, 7)
    assert [indices_of(sharding, rank) for rank in range(2)] == [[0, 1, 2], [3, 4, 5]]
    assert_owned_once(sharding)
    assert_slices_restore(sharding)


def test_row_parallel():
    sharding = _of_even_shares("w", (7, 3), dim=1, tp_size=2, num_stacked=1, num_rows=None)
    assert sharding.shape == (7, 6)
    assert_slices_restore(sharding)


def test_a_gated_projection_is_gates_above_ups():
    sharding = _of_even_shares("fc1", (4, 5), dim=0, tp_size=3, num_stacked=2, num_rows=None)
    assert sharding.shape == (12, 5)
    assert [indices_of(sharding, rank) for rank in range(3)] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    assert_owned_once(sharding)
    assert_slices_restore(sharding)


def test_the_vocabulary_loses_its_padding():
    sharding = _of_even_shares("embedding", (3, 2), dim=0, tp_size=3, num_stacked=1, num_rows=5)
    assert sharding.shape == (5, 2)
    assert [indices_of(sharding, rank) for rank in range(3)] == [[0, 1, 2], [3, 4], []]
    assert torch.equal(sharding.slice(torch.ones(5, 2), 1), torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]))
    assert_owned_once(sharding)
    assert_slices_restore(sharding)


def test_a_replicated_parameter_is_owned_by_the_first_rank():
    sharding = _of_even_shares("norm", (5,), dim=None, tp_size=3, num_stacked=1, num_rows=None)
    assert [indices_of(sharding, rank) for rank in range(3)] == [[0, 1, 2, 3, 4]] * 3
    assert [len(sharding.owned(rank)) for rank in range(3)] == [1, 0, 0]
    assert_slices_restore(sharding)


def test_qkv_where_kv_heads_are_replicated():
    layer = SimpleNamespace(partition=HeadPartition(4, 2, 4), head_dim=2, output_gate=False)
    queries = _of_heads(layer, "a.", "linear_q.weight", (2, 3))
    kv = _of_heads(layer, "a.", "linear_kv.weight", (4, 3))
    assert queries.name == kv.name == "a.linear_qkv.weight"
    assert queries.shape == kv.shape == (16, 3)  # q0 q1 k0 v0 q2 q3 k1 v1, two rows each
    assert [indices_of(queries, rank) for rank in range(4)] == [[0, 1], [2, 3], [8, 9], [10, 11]]
    assert [indices_of(kv, rank) for rank in range(4)] == [[4, 5, 6, 7]] * 2 + [[12, 13, 14, 15]] * 2
    assert [len(kv.owned(rank)) for rank in range(4)] == [1, 0, 1, 0]


@given(num_kv_heads=st.integers(1, 5), per_group=st.integers(1, 4), tp_size=st.integers(1, 20), gated=st.booleans())
def test_every_row_of_every_partition_is_owned_once(num_kv_heads, per_group, tp_size, gated):
    num_heads = num_kv_heads * per_group
    partition = HeadPartition(num_heads, num_kv_heads, min(tp_size, num_heads))
    layer = SimpleNamespace(partition=partition, head_dim=3, output_gate=gated)
    paths = ["linear_q.bias", "linear_kv.bias"] if partition.replicates_kv else ["linear_qkv.bias"]
    shardings = [_of_heads(layer, "", path, (0,)) for path in paths]
    owned = [
        index
        for sharding in shardings
        for rank in range(partition.tp_size)
        for piece in sharding.owned(rank)
        for index in piece
    ]
    assert sorted(owned) == list(range(shardings[0].shape[0]))
    assert_owned_once(_of_heads(layer, "", "linear_proj.weight", (5, 0)))
    assert_slices_restore(_of_heads(layer, "", "core_attention.softmax_offset", (0,)))


@pytest.mark.parametrize("path", ["linear_proj.bias", "q_layernorm.weight", "linear_proj.post_layernorm.weight"])
def test_what_is_not_cut_by_heads(path):
    layer = SimpleNamespace(partition=HeadPartition(4, 2, 4), head_dim=2, output_gate=False)
    assert _of_heads(layer, "", path, (5,)) is None
