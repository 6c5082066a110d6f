import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType

from gqa_parallel import UserError
from gqa_parallel.megatron.config import GQATransformerConfig
from gqa_parallel.megatron.refusals import refuse_unsupported_arguments, refuse_unsupported_config
from gqa_parallel.partition.heads import HeadPartition


class TELayerNormColumnParallelLinear:
    """Stands for Transformer Engine's, which contains the norm."""


def refuse(linear_qkv=ColumnParallelLinear, mask=AttnMaskType.causal, tp_size=1, **settings):
    config = GQATransformerConfig(num_layers=2, hidden_size=16, num_attention_heads=4, num_query_groups=2)
    for name, value in settings.items():  # past Megatron's own checks, some of which need CUDA extensions
        setattr(config, name, value)
    submodules = SelfAttentionSubmodules(linear_qkv=linear_qkv, core_attention=None)
    refuse_unsupported_config(config, submodules, mask, HeadPartition(4, 2, tp_size))


def test_the_defaults_pass():
    refuse()
    refuse(tp_size=4)
    refuse(linear_qkv=TELayerNormColumnParallelLinear, tp_size=2)


@pytest.mark.parametrize(
    "setting",
    [
        {"context_parallel_size": 2},
        {"qk_clip": True},
        {"fp8": "e4m3"},
        {"flash_decode": True},
        {"apply_rope_fusion": True},
        {"gradient_accumulation_fusion": True},
        {"yarn_rotary_scaling_factor": 4.0},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_are_refused_by_name(setting):
    ((name, value),) = setting.items()
    with pytest.raises(UserError) as error:
        refuse(**setting)
    assert str(error.value).startswith(f"{name} ({value!r}) must be ")
    assert "Set " in str(error.value)


def test_half_supported_settings_are_refused_with_a_way_out():
    with pytest.raises(UserError, match=r"window_size \(\(7, 7\)\) must be \(keys before the query, 0\)"):
        refuse(window_size=(7, 7))
    with pytest.raises(UserError, match=r"softmax_type \('off-by-one'\) must be 'vanilla' or 'learnable'"):
        refuse(softmax_type="off-by-one")


def test_another_mask_is_refused():
    with pytest.raises(UserError, match=r"attn_mask_type \(AttnMaskType.padding\) must be AttnMaskType.causal"):
        refuse(mask=AttnMaskType.padding)


def test_a_norm_inside_the_projection_is_refused_where_kv_is_replicated():
    with pytest.raises(
        UserError, match=r"linear_qkv \(TELayerNormColumnParallelLinear\) must not contain the layer norm"
    ):
        refuse(linear_qkv=TELayerNormColumnParallelLinear, tp_size=4)


def test_arguments_are_refused_by_name():
    refuse_unsupported_arguments(attention_mask=None, attention_bias=None)
    with pytest.raises(UserError) as error:
        refuse_unsupported_arguments(attention_bias=None, attention_mask=torch.ones(1))
    assert str(error.value) == (
        "attention_mask (Tensor) must be None: GroupedQueryAttention does not support it; the mask is causal; "
        "build the dataset with create_attention_mask=False."
    )
