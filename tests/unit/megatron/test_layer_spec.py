import copy

import pytest
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules

from gqa_parallel import UserError, gqa_layer_spec, with_gqa
from gqa_parallel.megatron.config import GQATransformerConfig
from gqa_parallel.megatron.norm import TorchNorm
from gqa_parallel.megatron.self_attention import GQASelfAttention


def attention_of(layer: ModuleSpec) -> ModuleSpec:
    return layer.submodules.self_attention


def test_a_layers_attention_is_replaced_and_nothing_else():
    theirs = get_gpt_layer_local_spec(qk_layernorm=True)
    before = copy.deepcopy(theirs)
    ours = with_gqa(theirs)
    assert attention_of(ours).module is GQASelfAttention
    assert theirs == before, "the argument must not change"
    attention_of(ours).module = SelfAttention
    assert ours == theirs


def test_blocks():
    layers = [get_gpt_layer_local_spec(), get_gpt_layer_local_spec(qk_layernorm=True)]
    block = TransformerBlockSubmodules(layer_specs=layers, layer_norm=TorchNorm)
    for replaced in (with_gqa(block), with_gqa(ModuleSpec(module=TransformerBlock, submodules=block)).submodules):
        assert [attention_of(layer).module for layer in replaced.layer_specs] == [GQASelfAttention] * 2
        assert replaced.layer_norm is TorchNorm


def test_twice_is_once():
    once = with_gqa(get_gpt_layer_local_spec())
    assert with_gqa(once) == once


def test_what_has_no_self_attention_is_refused():
    with pytest.raises(UserError, match=r"spec.self_attention \(None\) must be Megatron's SelfAttention"):
        with_gqa(ModuleSpec(module=MLP))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_our_layer_needs_no_extension(qk_norm):
    config = GQATransformerConfig(
        num_layers=2, hidden_size=16, num_attention_heads=4, num_query_groups=2, qk_layernorm=qk_norm
    )
    layer = gqa_layer_spec(config).submodules
    assert layer.input_layernorm is layer.pre_mlp_layernorm is TorchNorm
    assert (layer.self_attention.submodules.q_layernorm is TorchNorm) == qk_norm
