"""The head partition: its promises over all small sizes, its table, its messages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa_parallel.errors import UserError
from gqa_parallel.partition.heads import HeadPartition, even_split


@st.composite
def partitions(draw) -> HeadPartition:
    num_kv_heads = draw(st.integers(1, 12))
    num_heads = num_kv_heads * draw(st.integers(1, 8))
    return HeadPartition(num_heads, num_kv_heads, draw(st.integers(1, num_heads)))


def ranks(partition: HeadPartition) -> range:
    return range(partition.tp_size)


@given(partitions())
def test_each_query_head_is_on_one_rank_in_order(partition):
    heads = [head for rank in ranks(partition) for head in partition.query_heads(rank)]
    assert heads == list(range(partition.num_heads))


@given(partitions())
def test_no_rank_is_idle(partition):
    assert all(len(partition.query_heads(rank)) >= 1 for rank in ranks(partition))


@given(partitions())
def test_a_rank_has_the_kv_heads_of_its_query_heads_and_no_other(partition):
    heads_per_group = partition.num_heads // partition.num_kv_heads
    for rank in ranks(partition):
        needed = {head // heads_per_group for head in partition.query_heads(rank)}
        assert set(partition.kv_heads(rank)) == needed


@given(partitions())
def test_local_query_heads_divide_evenly_over_local_kv_heads(partition):
    for rank in ranks(partition):
        kv_heads = partition.kv_heads(rank)
        per_kv_head = [
            sum(head // partition.heads_per_group == kv_head for head in partition.query_heads(rank))
            for kv_head in kv_heads
        ]
        assert len(set(per_kv_head)) == 1


@given(partitions())
def test_kv_heads_are_on_one_rank_or_alone_on_each_of_several(partition):
    holders = [
        [rank for rank in ranks(partition) if kv_head in partition.kv_heads(rank)]
        for kv_head in range(partition.num_kv_heads)
    ]
    if partition.tp_size <= partition.num_kv_heads:
        assert all(len(ranks_of_head) == 1 for ranks_of_head in holders)
        assert not partition.replicates_kv
    else:
        assert all(len(partition.kv_heads(rank)) == 1 for rank in ranks(partition))
        assert partition.replicates_kv


@given(partitions())
def test_replicas_are_consecutive_and_agree(partition):
    for rank in ranks(partition):
        replicas = partition.kv_replica_ranks(rank)
        assert rank in replicas
        assert replicas.step == 1
        assert list(replicas) == [
            other for other in ranks(partition) if partition.kv_heads(other) == partition.kv_heads(rank)
        ]
        assert all(partition.kv_replica_ranks(other) == replicas for other in replicas)


@given(partitions())
def test_shares_differ_by_one_unit_and_larger_ones_come_first(partition):
    if not partition.replicates_kv:
        shares = [[len(partition.kv_heads(rank)) for rank in ranks(partition)]]
    else:
        replica_sets = sorted({partition.kv_replica_ranks(rank) for rank in ranks(partition)}, key=min)
        shares = [[len(replicas) for replicas in replica_sets]]
        shares += [[len(partition.query_heads(rank)) for rank in replicas] for replicas in replica_sets]
    for share in shares:
        assert max(share) - min(share) <= 1
        assert share == sorted(share, reverse=True)


@given(partitions())
def test_imbalance_is_the_largest_share_over_the_mean(partition):
    counts = [len(partition.query_heads(rank)) for rank in ranks(partition)]
    assert partition.imbalance == pytest.approx(max(counts) / (sum(counts) / len(counts)))
    assert partition.imbalance >= 1


@given(st.integers(1, 60), st.integers(1, 20))
def test_even_split_covers_in_order(total, parts):
    shares = [even_split(total, parts, index) for index in range(parts)]
    assert [item for share in shares for item in share] == list(range(total))


@pytest.mark.parametrize(
    ("sizes", "query_heads", "kv_heads", "replicas"),
    [
        # T <= G, T divides G
        ((8, 4, 2), ["0-3", "4-7"], ["0-1", "2-3"], ["0-0", "1-1"]),
        # T <= G, T does not divide G
        ((6, 3, 2), ["0-3", "4-5"], ["0-1", "2-2"], ["0-0", "1-1"]),
        # T > G, G divides T
        ((8, 2, 4), ["0-1", "2-3", "4-5", "6-7"], ["0-0", "0-0", "1-1", "1-1"], ["0-1", "0-1", "2-3", "2-3"]),
        # T > G, uneven slices of a group
        (
            (14, 2, 4),
            ["0-3", "4-6", "7-10", "11-13"],
            ["0-0", "0-0", "1-1", "1-1"],
            ["0-1", "0-1", "2-3", "2-3"],
        ),
        # T > G, G does not divide T
        ((4, 2, 3), ["0-0", "1-1", "2-3"], ["0-0", "0-0", "1-1"], ["0-1", "0-1", "2-2"]),
        # MQA
        ((3, 1, 2), ["0-1", "2-2"], ["0-0", "0-0"], ["0-1", "0-1"]),
    ],
)
def test_table(sizes, query_heads, kv_heads, replicas):
    partition = HeadPartition(*sizes)

    def spans(of):
        return [f"{of(rank).start}-{of(rank).stop - 1}" for rank in ranks(partition)]

    assert spans(partition.query_heads) == query_heads
    assert spans(partition.kv_heads) == kv_heads
    assert spans(partition.kv_replica_ranks) == replicas


@pytest.mark.parametrize(
    ("sizes", "query_head_counts", "imbalance"),
    [
        ((40, 10, 4), [12, 12, 8, 8], 1.2),
        ((14, 2, 4), [4, 3, 4, 3], 8 / 7),
        ((28, 4, 8), [4, 3, 4, 3, 4, 3, 4, 3], 8 / 7),
        ((32, 8, 8), [4] * 8, 1.0),
    ],
)
def test_sizes_that_other_systems_refuse(sizes, query_head_counts, imbalance):
    partition = HeadPartition(*sizes)
    assert [len(partition.query_heads(rank)) for rank in ranks(partition)] == query_head_counts
    assert partition.imbalance == pytest.approx(imbalance)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            (14, 4, 2),
            "num_heads (14) must be a multiple of num_kv_heads (4): "
            "the query heads of a group share one KV head. Use num_kv_heads 1, 2, 7 or 14.",
        ),
        (
            (4, 2, 5),
            "tp (5) must be at most num_heads (4): a rank without a query head would be idle. Use tp 4 or less.",
        ),
        ((0, 1, 1), "num_heads (0) must be a whole number of at least 1."),
        ((4, -2, 1), "num_kv_heads (-2) must be a whole number of at least 1."),
        ((4, 2, 1.0), "tp_size (1.0) must be a whole number of at least 1."),
        ((4, 2, True), "tp_size (True) must be a whole number of at least 1."),
    ],
)
def test_messages(sizes, message):
    with pytest.raises(UserError) as error:
        HeadPartition(*sizes)
    assert str(error.value) == message


@pytest.mark.parametrize("method", ["query_heads", "kv_heads", "kv_replica_ranks"])
@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_outside_is_refused(method, rank):
    with pytest.raises(IndexError, match=rf"rank \({rank}\) must be in 0..3, the ranks of tp \(4\)"):
        getattr(HeadPartition(8, 2, 4), method)(rank)
