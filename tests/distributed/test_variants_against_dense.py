"""Each attention variant alone, and some together, against the dense float64 reference: forward and all gradients."""

import pytest

from tests.distributed.layers import compare_with_dense

TOLERANCE = 1e-10  # as in test_layer_against_dense

HEADS = [(6, 1), (6, 2), (6, 6)]  # MQA, GQA (replicated at tp 3), MHA
VARIANTS = {
    "window": {"window": 5},
    "window wider than the sequence": {"window": 99},
    "softcap": {"softcap": 0.7},
    "sinks": {"sinks": True},
    "output gate": {"output_gate": True},
    "output gate, bias": {"output_gate": True, "qkv_bias": True},
    "softmax scale": {"softmax_scale": 0.21},
    "all": {
        "window": 4,
        "softcap": 1.5,
        "sinks": True,
        "output_gate": True,
        "softmax_scale": 0.3,
        "qkv_bias": True,
        "qk_norm_eps": 1e-5,
    },
}
ROTARY = {"partial": ({}, 4), "interleaved": ({"rotary_interleaved": True}, None)}
DOCUMENTS = {"three documents": [5, 11, 8], "one document": [12], "single tokens": [1, 1, 10]}


def shape(heads, **variant):
    return {"hidden_size": 13, "num_heads": heads[0], "num_kv_heads": heads[1], "head_dim": 6, **variant}


def check(ranks, tp_size, *arguments):
    for rank, errors in enumerate(ranks(tp_size)(compare_with_dense, *arguments)):
        wrong = {name: error for name, error in errors.items() if not error < TOLERANCE}
        assert not wrong, f"rank {rank}"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("heads", HEADS, ids="{0[0]}-{0[1]}".format)
@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_variant(ranks, tp_size, heads, variant):
    check(ranks, tp_size, shape(heads, **VARIANTS[variant]), {})


@pytest.mark.parametrize("variant", ROTARY)
@pytest.mark.parametrize("heads", HEADS, ids="{0[0]}-{0[1]}".format)
@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_rotary(ranks, tp_size, heads, variant):
    check(ranks, tp_size, shape(heads), *ROTARY[variant])


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("heads", HEADS, ids="{0[0]}-{0[1]}".format)
@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_packed_documents(ranks, tp_size, heads, documents):
    check(ranks, tp_size, shape(heads, window=4, qk_norm_eps=1e-5), {}, None, DOCUMENTS[documents])


@pytest.mark.parametrize("variant", ["all", "sinks"])
def test_sequence_parallel_and_recomputed(ranks, variant):
    settings = {"sequence_parallel": True, "recompute_granularity": "selective"}
    check(ranks, 3, shape((6, 2), **VARIANTS[variant]), settings, None, DOCUMENTS["three documents"])
