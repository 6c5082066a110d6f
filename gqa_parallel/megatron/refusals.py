"""What Megatron-Core's self-attention can be asked for and this one does not do: refused by name, never swallowed."""

from typing import Any

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType

from gqa_parallel.errors import UserError
from gqa_parallel.partition.heads import HeadPartition

_SUPPORTED_CONFIG = {
    "context_parallel_size": 1,
    "multi_latent_attention": False,
    "qk_clip": False,
    "log_max_attention_logit": False,
    "yarn_rotary_scaling_factor": None,
    "experimental_attention_variant": None,
    "apply_query_key_layer_scaling": False,
    "fused_single_qkv_rope": False,
    "apply_rope_fusion": False,
    "fp8": None,
    "fp4": None,
    "flash_decode": False,
    "batch_invariant_mode": False,
    "fine_grained_activation_offloading": False,
    "cpu_offloading": False,
    "gradient_accumulation_fusion": False,
}

_WAY_OUT = {
    "attention_mask": "the mask is causal; build the dataset with create_attention_mask=False",
    "inference_context": "key/value caching is not supported yet",
    "inference_params": "key/value caching is not supported yet",
}


def refuse_unsupported_config(
    config: TransformerConfig,
    submodules: SelfAttentionSubmodules,
    attn_mask_type: AttnMaskType,
    partition: HeadPartition,
) -> None:
    """
    Raises:
        UserError: names the first setting that the layer does not support.
    """
    for name, supported in _SUPPORTED_CONFIG.items():
        value = getattr(config, name, supported)
        if value != supported:
            raise UserError(
                f"{name} ({value!r}) must be {supported!r} with grouped-query attention of gqa_parallel: "
                f"the layer does not implement it. Set {name}={supported!r} or keep Megatron's SelfAttention."
            )
    if config.softmax_type == "off-by-one":
        raise UserError(
            "softmax_type ('off-by-one') must be 'vanilla' or 'learnable': the layer learns its sinks. "
            "Set softmax_type='learnable'; it starts at a logit of 0, which is off-by-one."
        )
    if config.window_size is not None and (config.window_size[0] < 0 or config.window_size[1] != 0):
        raise UserError(
            f"window_size ({config.window_size}) must be (keys before the query, 0): attention is causal. "
            "Set window_size=(w - 1, 0) for a window of w keys, or None."
        )
    if attn_mask_type != AttnMaskType.causal:
        raise UserError(
            f"attn_mask_type ({attn_mask_type}) must be AttnMaskType.causal: the layer masks the future and nothing "
            "else. Set it in the spec's params."
        )
    if partition.replicates_kv and "LayerNorm" in getattr(submodules.linear_qkv, "__name__", ""):
        raise UserError(
            f"linear_qkv ({submodules.linear_qkv.__name__}) must not contain the layer norm where KV heads are "
            f"replicated (tp {partition.tp_size} > num_kv_heads {partition.num_kv_heads}): queries and KV heads are "
            "projected apart, and each would get a norm of its own. Use gqa_layer_spec(config)."
        )


def refuse_unsupported_arguments(**arguments: Any) -> None:
    """
    Raises:
        UserError: names the first argument that is not None.
    """
    for name, value in arguments.items():
        if value is not None:
            raise UserError(
                f"{name} ({type(value).__name__}) must be None: GroupedQueryAttention does not support it; "
                f"{_WAY_OUT.get(name, 'no variant of the layer takes it yet')}."
            )
