"""The tensor-parallel layer equals the dense reference: output, input gradient and every weight gradient."""

import pytest

from tests.distributed.layers import compare_with_dense

# sums of float64 products in another order: a few hundred terms of rounding 1e-16 each
TOLERANCE = 1e-10

HEADS = [(8, 8), (8, 4), (8, 2), (8, 1), (6, 3), (10, 5), (14, 2), (12, 4)]
VARIANTS = {
    "plain": {},
    "bias": {"qkv_bias": True, "output_bias": True},
    "qk_norm": {"qk_norm_eps": 1e-5},
    "bias+qk_norm": {"qkv_bias": True, "output_bias": True, "qk_norm_eps": 1e-5},
}


def shape(heads: tuple[int, int], variant: str) -> dict:
    return {
        "hidden_size": 13,
        "num_heads": heads[0],
        "num_kv_heads": heads[1],
        "head_dim": 6,
        **VARIANTS[variant],
    }


LAYOUTS = [(1, False), *((tp_size, parallel) for tp_size in (2, 3, 4) for parallel in (False, True))]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("heads", HEADS, ids="{0[0]}-{0[1]}".format)
@pytest.mark.parametrize(
    ("tp_size", "sequence_parallel"),
    LAYOUTS,
    ids=[f"tp{tp}{'-sequence' * parallel}" for tp, parallel in LAYOUTS],
)
def test_layer_equals_dense(ranks, tp_size, sequence_parallel, heads, variant):
    settings = {"sequence_parallel": sequence_parallel}
    for rank, errors in enumerate(ranks(tp_size)(compare_with_dense, shape(heads, variant), settings)):
        wrong = {name: error for name, error in errors.items() if not error < TOLERANCE}
        assert not wrong, f"rank {rank}"
