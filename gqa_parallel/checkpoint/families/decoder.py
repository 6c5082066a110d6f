"""What the configurations and names of all families share: a gated decoder with RMSNorm and rotary positions."""

from functools import partial
from typing import Any

from torch.nn import functional as F

from gqa_parallel.checkpoint.families.family import ModelArguments
from gqa_parallel.checkpoint.families.names import Source, SplitQKV, Stacked
from gqa_parallel.checkpoint.families.rope import rope_of
from gqa_parallel.checkpoint.families.settings import Settings
from gqa_parallel.errors import UserError

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}

MODULES: dict[str, Source] = {
    "embedding.word_embeddings": Stacked(("model.embed_tokens",)),
    "input_layernorm": Stacked(("input_layernorm",)),
    "self_attention.linear_qkv": SplitQKV("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.q_layernorm": Stacked(("self_attn.q_norm",)),
    "self_attention.k_layernorm": Stacked(("self_attn.k_norm",)),
    "self_attention.linear_proj": Stacked(("self_attn.o_proj",)),
    "pre_mlp_layernorm": Stacked(("post_attention_layernorm",)),
    "mlp.linear_fc1": Stacked(("mlp.gate_proj", "mlp.up_proj")),
    "mlp.linear_fc2": Stacked(("mlp.down_proj",)),
    "decoder.final_layernorm": Stacked(("model.norm",)),
    "output_layer": Stacked(("lm_head",)),
}
"""Llama's names, which the others took over."""


def read_decoder(settings: Settings, *, activation: str = "hidden_act") -> ModelArguments:
    """The fields that every family has and reads alike.

    Args:
        settings: taken from.
        activation: the name of the MLP's activation among them.
    """
    hidden_size, num_heads = settings.take("hidden_size"), settings.take("num_attention_heads")
    max_positions = settings.take("max_position_embeddings")
    config: dict[str, Any] = {
        "num_layers": settings.take("num_hidden_layers"),
        "hidden_size": hidden_size,
        "num_attention_heads": num_heads,
        "num_query_groups": settings.take("num_key_value_heads", num_heads),
        "kv_channels": settings.take("head_dim", hidden_size // num_heads),
        "ffn_hidden_size": settings.take("intermediate_size"),
        "gated_linear_unit": True,
        "activation_func": settings.choose(activation, ACTIVATIONS),
        "normalization": "RMSNorm",
        "layernorm_epsilon": settings.take("rms_norm_eps"),
        "attention_dropout": settings.take("attention_dropout", 0.0),
        "hidden_dropout": 0.0,
        "init_method_std": settings.take("initializer_range", 0.02),
        **_ropes(settings.take("rope_parameters"), max_positions),
    }
    settings.require("is_encoder_decoder", False, "it is a decoder")
    gpt = {
        "vocab_size": settings.take("vocab_size"),
        "max_sequence_length": max_positions,
        "tie_embeddings": settings.take("tie_word_embeddings", False),
    }
    return ModelArguments(config, gpt)


def read_biases(settings: Settings) -> dict[str, Any]:
    """``attention_bias`` (of QKV and output projection) and ``mlp_bias``, of which Megatron-Core has both or none.

    Raises:
        UserError: one is set without the other.
    """
    attention, mlp = settings.take("attention_bias", False), settings.take("mlp_bias", False)
    if attention != mlp:
        raise UserError(
            f"attention_bias ({attention}) must equal mlp_bias ({mlp}): Megatron-Core's linears outside QKV have "
            "biases together or not at all. Convert a model with both or neither."
        )
    return {"add_bias_linear": attention}


def _ropes(parameters: dict[str, Any], max_positions: int) -> dict[str, Any]:
    """One set of parameters, or one for each kind of layer."""
    if "full_attention" not in parameters:
        return {"rope": rope_of(parameters, max_positions)}
    return {
        "rope": rope_of(parameters["full_attention"], max_positions),
        "local_rope": rope_of(parameters["sliding_attention"], max_positions),
    }
