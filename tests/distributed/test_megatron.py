"""Our layer inside Megatron-Core: its weights, its specs, its checkpoints, its random streams."""

import shutil

import pytest

from tests.distributed.megatron_layers import (
    dropout_behaviour,
    error_against_megatron,
    load_layer_and_compare,
    same_start_as_megatron,
    save_layer,
    temporary_folder,
    train_megatrons_own_gpt,
)

# where Megatron's layer and ours partition alike: tp divides G
ALIKE = [(1, (8, 2)), (2, (8, 2)), (2, (4, 4)), (4, (12, 4)), (3, (6, 3))]


def shape(heads, **variant):
    return {"hidden_size": 14, "num_heads": heads[0], "num_kv_heads": heads[1], "head_dim": 6, **variant}


@pytest.mark.parametrize("variant", [{}, {"qkv_bias": True, "output_bias": True, "qk_norm_eps": 1e-5}])
@pytest.mark.parametrize(("tp_size", "heads"), ALIKE)
def test_equals_megatrons_self_attention(ranks, tp_size, heads, variant):
    for errors in ranks(tp_size)(error_against_megatron, shape(heads, **variant)):
        assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize(("tp_size", "heads"), ALIKE)
def test_draws_the_weights_that_megatron_draws(ranks, tp_size, heads):
    assert all(ranks(tp_size)(same_start_as_megatron, shape(heads, qkv_bias=True, qk_norm_eps=1e-5)))


def test_megatrons_own_gpt_spec_trains(ranks):
    (alone,) = ranks(1, 1)(train_megatrons_own_gpt, 12)
    assert alone[-1] < 0.9 * alone[0]
    for losses in ranks(4)(train_megatrons_own_gpt, 12):
        assert losses == pytest.approx(alone, rel=1e-5)


def test_checkpoints_move_between_all_partitions(ranks):
    """tp 1, 2 and 4 hold whole groups; 3 is uneven; H = 12, G = 4. Every pair, bit for bit."""
    for saved_by in (1, 2, 3, 4):
        folder = temporary_folder()
        try:
            ranks(saved_by)(save_layer, folder)
            for read_by in (1, 2, 3, 4):
                assert all(ranks(read_by)(load_layer_and_compare, folder)), (saved_by, read_by)
        finally:
            shutil.rmtree(folder)


@pytest.mark.parametrize("settings", [{}, {"sequence_parallel": True}], ids=["", "sequence_parallel"])
def test_attention_dropout(ranks, settings):
    for behaviour in ranks(2)(dropout_behaviour, settings):
        assert all(behaviour.values()), behaviour
