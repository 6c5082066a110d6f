"""What one layer communicates: the design's collectives and no other, byte by byte."""

import pytest

from tests.distributed.collectives import collectives_of_one_layer

SEQUENCE, BATCH, HIDDEN, HEAD_DIM = 12, 3, 14, 6
ACTIVATION = SEQUENCE * BATCH * HIDDEN * 4  # bytes of [S, B, D] in float32
KV_WEIGHT = 2 * HEAD_DIM * HIDDEN * 4
NORM_WEIGHT = HEAD_DIM * 4


def run(ranks, heads, tp_size, sequence_parallel=False, **variant):
    shape = {
        "hidden_size": HIDDEN,
        "num_heads": heads[0],
        "num_kv_heads": heads[1],
        "head_dim": HEAD_DIM,
        **variant,
    }
    return ranks(tp_size)(collectives_of_one_layer, shape, sequence_parallel, SEQUENCE, BATCH)


@pytest.mark.parametrize("heads", [(8, 8), (8, 4), (10, 5)])
def test_whole_groups_cost_two_all_reduces_as_mha(ranks, heads):
    for log in run(ranks, heads, tp_size=4):
        assert log == {"forward": [("allreduce", ACTIVATION)], "backward": [("allreduce", ACTIVATION)]}


@pytest.mark.parametrize("heads", [(8, 2), (8, 1), (14, 2)])
def test_replicated_kv_adds_the_sum_of_its_weight_gradient(ranks, heads):
    for log in run(ranks, heads, tp_size=4):
        assert log["forward"] == [("allreduce", ACTIVATION)]
        assert sorted(log["backward"]) == sorted([("allreduce", ACTIVATION), ("allreduce", KV_WEIGHT)])


def test_a_kv_head_on_one_rank_adds_nothing_there(ranks):
    """H = 4, G = 2 over 3 ranks: KV head 0 lies on ranks 0 and 1, KV head 1 on rank 2 alone."""
    *sharers, alone = run(ranks, (4, 2), tp_size=3)
    assert ("allreduce", KV_WEIGHT) not in alone["backward"]
    assert all(("allreduce", KV_WEIGHT) in log["backward"] for log in sharers)


def test_qk_norm_adds_two_sums_of_head_dim(ranks):
    for log in run(ranks, (8, 4), tp_size=2, qk_norm_eps=1e-5):
        assert sorted(log["backward"]) == sorted([("allreduce", ACTIVATION), *[("allreduce", NORM_WEIGHT)] * 2])


def test_sequence_parallel_with_whole_groups(ranks):
    """Megatron's fused projection gathers its input again for the weight gradient instead of keeping it."""
    for log in run(ranks, (8, 4), tp_size=2, sequence_parallel=True):
        assert [name for name, _ in log["forward"]] == ["allgather_base", "reduce_scatter_base"]
        assert sorted(name for name, _ in log["backward"]) == [
            "allgather_base",
            "allgather_base",
            "reduce_scatter_base",
        ]
        assert {size for _, size in log["forward"] + log["backward"]} == {ACTIVATION}


def test_sequence_parallel_with_replicated_kv(ranks):
    for log in run(ranks, (8, 2), tp_size=4, sequence_parallel=True):
        assert [name for name, _ in log["forward"]] == ["allgather_base", "reduce_scatter_base"]
        assert sorted(log["backward"]) == sorted(
            [("allgather_base", ACTIVATION), ("reduce_scatter_base", ACTIVATION), ("allreduce", KV_WEIGHT)]
        )
