"""The ``config.json`` of a model that was configured here: the first family that computes the same."""

from collections.abc import Callable, Iterator
from typing import Any

from gqa_parallel.checkpoint.huggingface import model_arguments
from gqa_parallel.conf.schema import Activation, ModelConfig, RopeScalingConfig, RopeScalingType
from gqa_parallel.errors import UserError
from gqa_parallel.training.model_arguments import differences, model_arguments_of, model_config_of


def huggingface_config(model: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """Fields of ``config.json`` from which ``model_arguments`` reads this very model.

    Args:
        model: checked.
        vocab_size: rows of the embedding without padding.
    Raises:
        UserError: no family of Hugging Face computes the same; says what the nearest lacks.
    """
    wanted = model_config_of(model_arguments_of(model, vocab_size), model.name)
    nearest: dict[str, tuple[str, str]] | None = None
    for fields in _candidates(wanted):
        try:
            read = model_config_of(model_arguments(fields), model.name)
        except UserError:
            continue
        lacking = differences(wanted, read)
        if not lacking:
            return fields
        if nearest is None or len(lacking) < len(nearest):
            nearest = lacking
    lacks = ", ".join(f"{key}={ours} (only {theirs})" for key, (ours, theirs) in (nearest or {}).items())
    raise UserError(
        f"model ({model.name}) must be of a family of Hugging Face that gqa_parallel knows: none computes the same, "
        f"the nearest has no {lacks or 'such combination'}. Keep it as a checkpoint of ours."
    )


def _candidates(model: ModelConfig) -> Iterator[dict[str, Any]]:
    common = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "attention_dropout": model.attention_dropout,
        "tie_word_embeddings": model.tie_embeddings,
        "rope_parameters": _rope_parameters(model),
        # the defaults of some families name tokens that the vocabulary need not have
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    for (model_type, architecture), own in _FAMILIES.items():
        yield {"architectures": [architecture], "model_type": model_type, **common, **own(model)}


def _hidden_act(model: ModelConfig) -> str:
    return {Activation.swiglu: "silu", Activation.geglu: "gelu_pytorch_tanh", Activation.gelu: "gelu"}[model.activation]


def _rope_parameters(model: ModelConfig) -> dict[str, Any]:
    scaling = model.rope_scaling
    parameters = {"rope_type": "default", "rope_theta": model.rope_theta}
    names: dict[RopeScalingType, tuple[str, ...]] = {
        RopeScalingType.none: (),
        RopeScalingType.linear: ("factor",),
        RopeScalingType.dynamic: ("factor",),
        RopeScalingType.llama3: ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        RopeScalingType.yarn: (
            "factor",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "original_max_position_embeddings",
        ),
    }
    if scaling != RopeScalingConfig():
        parameters["rope_type"] = scaling.type.value
        parameters |= {name: getattr(scaling, name) for name in names[scaling.type]}
    return parameters


def _biases(model: ModelConfig) -> dict[str, Any]:
    return {"hidden_act": _hidden_act(model), "attention_bias": model.linear_bias, "mlp_bias": model.linear_bias}


def _layer_types(model: ModelConfig) -> dict[str, Any]:
    if model.window is None:
        return {"layer_types": ["full_attention"] * model.num_layers}
    every = model.global_every or model.num_layers + 1
    kinds = ["sliding_attention" if layer % every else "full_attention" for layer in range(1, model.num_layers + 1)]
    return {"sliding_window": model.window, "layer_types": kinds}


def _qwen(model: ModelConfig) -> dict[str, Any]:
    return {"hidden_act": _hidden_act(model), "use_sliding_window": model.window is not None, **_layer_types(model)}


def _phi3(model: ModelConfig) -> dict[str, Any]:
    rope = {**_rope_parameters(model), "partial_rotary_factor": model.rope_fraction}
    return {"hidden_act": _hidden_act(model), "sliding_window": model.window, "rope_parameters": rope}


def _gemma(model: ModelConfig) -> dict[str, Any]:
    scale = model.head_dim**-0.5 if model.softmax_scale is None else model.softmax_scale
    return {
        "hidden_activation": _hidden_act(model),
        "query_pre_attn_scalar": round(scale**-2),  # transformers wants an integer
        "final_logit_softcapping": model.logit_softcap,
        "attention_bias": model.linear_bias,
        **_layer_types(model),
    }


def _gemma2(model: ModelConfig) -> dict[str, Any]:
    return {**_gemma(model), "attn_logit_softcapping": model.attention_softcap}


def _gemma3(model: ModelConfig) -> dict[str, Any]:
    local_theta = model.rope_theta if model.local_rope_theta is None else model.local_rope_theta
    ropes = {
        "full_attention": _rope_parameters(model),
        "sliding_attention": {"rope_type": "default", "rope_theta": local_theta},
    }
    return {**_gemma(model), "rope_parameters": ropes}


def _granite(model: ModelConfig) -> dict[str, Any]:
    return {
        **_biases(model),
        "embedding_multiplier": model.embedding_multiplier,
        "residual_multiplier": model.residual_multiplier,
        "attention_multiplier": model.head_dim**-0.5 if model.softmax_scale is None else model.softmax_scale,
        "logits_scaling": 1 / model.logit_multiplier,
    }


_FAMILIES: dict[tuple[str, str], Callable[[ModelConfig], dict[str, Any]]] = {
    ("llama", "LlamaForCausalLM"): _biases,
    ("qwen2", "Qwen2ForCausalLM"): _qwen,
    ("qwen3", "Qwen3ForCausalLM"): lambda model: {**_qwen(model), "attention_bias": model.linear_bias},
    ("mistral", "MistralForCausalLM"): lambda model: {
        "hidden_act": _hidden_act(model),
        "sliding_window": model.window,
    },
    ("phi3", "Phi3ForCausalLM"): _phi3,
    ("gemma2", "Gemma2ForCausalLM"): _gemma2,
    ("gemma3_text", "Gemma3ForCausalLM"): _gemma3,
    ("granite", "GraniteForCausalLM"): _granite,
}
"""Model type and class of each family, in the order of preference, with the fields that it has besides the common."""
