import pytest

from gqa_parallel import UserError
from gqa_parallel.megatron.config import GQATransformerConfig
from gqa_parallel.megatron.layer_spec import gqa_block_spec
from gqa_parallel.megatron.model import build_gpt
from gqa_parallel.megatron.variant import BranchOutputLinear, GPTVariant, with_variant


def config(**settings) -> GQATransformerConfig:
    return GQATransformerConfig(num_layers=2, hidden_size=12, num_attention_heads=2, **settings)


def test_a_model_without_positions_is_refused():
    with pytest.raises(UserError, match=r"config.rope \(None\) must be a Rope: .* Set rope=Rope\(theta=10000.0\)"):
        build_gpt(config(), vocab_size=7, max_sequence_length=5, tie_embeddings=True)


def test_a_variant_that_departs_nowhere_keeps_the_block():
    block = gqa_block_spec(config())
    assert with_variant(block, GPTVariant(logit_softcap=3.0)) is block


def test_a_variant_replaces_the_last_linears_of_a_copy():
    block = gqa_block_spec(config())
    changed = with_variant(block, GPTVariant(post_norms=True))
    for layer in changed.layer_specs:
        attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp.submodules
        assert attention.linear_proj.module is mlp.linear_fc2.module is BranchOutputLinear
    assert block.layer_specs[0].submodules.mlp.submodules.linear_fc2 is not BranchOutputLinear
    assert block == gqa_block_spec(config())
