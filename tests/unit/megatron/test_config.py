import pytest

from gqa_parallel import UserError
from gqa_parallel.megatron.config import GQATransformerConfig


def config(heads, kv_heads, tp_size, **settings):
    defaults = {"num_layers": 2, "hidden_size": 8 * heads, "tensor_model_parallel_size": tp_size}
    return GQATransformerConfig(**{**defaults, "num_attention_heads": heads, "num_query_groups": kv_heads, **settings})


@pytest.mark.parametrize("shape", [(40, 10, 4), (14, 2, 4), (28, 4, 8), (10, 5, 3), (6, 3, 5), (7, 1, 7)])
def test_admits_what_megatron_refuses(shape):
    admitted = config(*shape)
    assert (admitted.num_attention_heads, admitted.num_query_groups, admitted.kv_channels) == (*shape[:2], 8)


def test_heads_without_groups_are_mha():
    assert config(6, None, 4).num_query_groups == 6


def test_megatrons_own_checks_still_hold():
    with pytest.raises(ValueError, match="sequence parallelism without tensor parallelism"):
        config(4, 2, 1, sequence_parallel=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"heads": 14, "kv_heads": 4, "tp_size": 2},
            "num_heads (14) must be a multiple of num_kv_heads (4): the query heads of a group share one KV head. "
            "Use num_kv_heads 1, 2, 7 or 14.",
        ),
        (
            {"heads": 4, "kv_heads": 2, "tp_size": 5},
            "tp (5) must be at most num_heads (4): a rank without a query head would be idle. Use tp 4 or less.",
        ),
        (
            {"heads": 4, "kv_heads": 2, "tp_size": 1, "hidden_size": 18},
            "hidden_size (18) must be a multiple of num_heads (4): head_dim is their quotient. "
            "Set kv_channels (head_dim).",
        ),
    ],
)
def test_refuses_by_name(arguments, message):
    with pytest.raises(UserError) as error:
        config(**arguments)
    assert str(error.value) == message
