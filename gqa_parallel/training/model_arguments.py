"""A ``model`` group of the configuration as what builds the model, and back."""

from dataclasses import asdict, fields
from enum import Enum
from functools import partial
from typing import Any

from torch.nn import functional as F

from gqa_parallel.attention.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    Rope,
    Scaling,
    YarnScaling,
)
from gqa_parallel.checkpoint.families.family import ModelArguments
from gqa_parallel.conf.model_shape import head_dim
from gqa_parallel.conf.schema import Activation, ModelConfig, Normalization, RopeScalingConfig, RopeScalingType
from gqa_parallel.errors import UserError
from gqa_parallel.megatron.variant import GPTVariant

ACTIVATIONS = {
    Activation.swiglu: F.silu,
    Activation.geglu: partial(F.gelu, approximate="tanh"),
    Activation.gelu: F.gelu,
}
# of a ModelConfig, what changes no tensor and no output
_MEANINGLESS = tuple(
    f"model.{name}" for name in ("name", "attention_dropout", "hidden_dropout", "init_std", "max_position_embeddings")
)


def model_arguments_of(model: ModelConfig, vocab_size: int) -> ModelArguments:
    """Megatron-Core's names for a model.

    Args:
        model: checked.
        vocab_size: the tokenizer's or the model's, without padding.
    """
    local_theta = model.local_rope_theta
    config = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_heads,
        "num_query_groups": model.num_kv_heads,
        "kv_channels": head_dim(model),
        "ffn_hidden_size": model.ffn_hidden_size,
        "gated_linear_unit": model.activation is not Activation.gelu,
        "activation_func": ACTIVATIONS[model.activation],
        "rope": Rope(model.rope_theta, model.rope_fraction, _scaling(model.rope_scaling)),
        "local_rope": None if local_theta is None else Rope(local_theta, model.rope_fraction),
        "window_size": None if model.window is None else (model.window - 1, 0),
        "window_attn_skip_freq": model.global_every,
        "softmax_scale": model.softmax_scale,
        "softmax_type": "learnable" if model.sinks else "vanilla",
        "attention_softcap": model.attention_softcap,
        "attention_output_gate": model.output_gate,
        "layernorm_zero_centered_gamma": model.zero_centered_norm,
        "normalization": "RMSNorm" if model.normalization is Normalization.rmsnorm else "LayerNorm",
        "layernorm_epsilon": model.norm_eps,
        "add_qkv_bias": model.qkv_bias,
        "add_bias_linear": model.linear_bias,
        "qk_layernorm": model.qk_norm,
        "attention_dropout": model.attention_dropout,
        "hidden_dropout": model.hidden_dropout,
        "init_method_std": model.init_std,
    }
    variant = GPTVariant(
        embedding_multiplier=model.embedding_multiplier,
        post_norms=model.post_norms,
        residual_multiplier=model.residual_multiplier,
        logit_multiplier=model.logit_multiplier,
        logit_softcap=model.logit_softcap,
    )
    gpt = {
        "vocab_size": vocab_size,
        "max_sequence_length": model.max_position_embeddings,
        "tie_embeddings": model.tie_embeddings,
        "variant": variant,
    }
    return ModelArguments(config, gpt)


def model_config_of(arguments: ModelArguments, name: str) -> ModelConfig:
    """The inverse of ``model_arguments_of``, with every value that has several spellings in one of them.

    Args:
        arguments: of a model, from wherever.
        name: to give it.
    Raises:
        UserError: the configuration has no words for a part of it.
    """
    config, gpt = dict(arguments.config), dict(arguments.gpt)
    variant: GPTVariant = gpt.pop("variant", None) or GPTVariant()
    rope, local_rope = config.pop("rope"), config.pop("local_rope", None)
    if local_rope is not None and local_rope != Rope(local_rope.theta, rope.fraction):
        raise _inexpressible("positions of local layers", local_rope)
    size, window, scale = config.pop("kv_channels"), config.pop("window_size", None), config.pop("softmax_scale", None)
    num_layers, vocab_size = config.pop("num_layers"), gpt.pop("vocab_size")
    pattern = config.pop("window_attn_skip_freq", None)
    model = ModelConfig(
        name=name,
        num_layers=num_layers,
        hidden_size=config.pop("hidden_size"),
        num_heads=config.pop("num_attention_heads"),
        num_kv_heads=config.pop("num_query_groups"),
        head_dim=size,
        ffn_hidden_size=config.pop("ffn_hidden_size"),
        vocab_size=vocab_size,
        max_position_embeddings=gpt.pop("max_sequence_length"),
        activation=_activation(config.pop("activation_func"), config.pop("gated_linear_unit")),
        normalization=Normalization[config.pop("normalization").lower()],
        norm_eps=float(config.pop("layernorm_epsilon")),
        rope_theta=float(rope.theta),
        rope_fraction=float(rope.fraction),
        rope_scaling=_scaling_config(rope.scaling),
        local_rope_theta=None if local_rope is None else float(local_rope.theta),
        qkv_bias=config.pop("add_qkv_bias", False),
        linear_bias=config.pop("add_bias_linear", False),
        qk_norm=config.pop("qk_layernorm", False),
        tie_embeddings=gpt.pop("tie_embeddings"),
        window=None if window is None else window[0] + 1,
        global_every=None if window is None else _global_every(pattern, num_layers),
        softmax_scale=None if scale is None or abs(scale * size**0.5 - 1) < 1e-9 else float(scale),
        attention_softcap=config.pop("attention_softcap", None),
        sinks=config.pop("softmax_type", "vanilla") == "learnable",
        output_gate=config.pop("attention_output_gate", False),
        zero_centered_norm=config.pop("layernorm_zero_centered_gamma", False),
        post_norms=variant.post_norms,
        logit_softcap=variant.logit_softcap,
        embedding_multiplier=float(variant.embedding_multiplier),
        residual_multiplier=float(variant.residual_multiplier),
        logit_multiplier=float(variant.logit_multiplier),
        attention_dropout=config.pop("attention_dropout", 0.0),
        hidden_dropout=config.pop("hidden_dropout", 0.0),
        init_std=config.pop("init_method_std", 0.02),
    )
    if config or gpt:
        raise _inexpressible("settings", ", ".join(sorted([*config, *gpt])))
    return model


def differences(here: ModelConfig, there: ModelConfig) -> dict[str, tuple[str, str]]:
    """Keys of the configuration in which two models differ, with both values as one writes overrides.

    Args:
        here, there: from ``model_config_of``, so that equal models are spelt alike.
    """
    ours, theirs = _spelt(asdict(here)), _spelt(asdict(there))
    return {key: (ours[key], theirs[key]) for key in ours if ours[key] != theirs[key] and key not in _MEANINGLESS}


def _spelt(values: dict[str, Any], prefix: str = "model.") -> dict[str, str]:
    spelt: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            spelt |= _spelt(value, f"{prefix}{name}.")
        elif isinstance(value, Enum):
            spelt[prefix + name] = str(value.value)
        elif value is None or isinstance(value, bool):
            spelt[prefix + name] = {None: "null", True: "true", False: "false"}[value]
        else:
            spelt[prefix + name] = str(value)
    return spelt


def _scaling(config: RopeScalingConfig) -> Scaling | None:
    length = config.original_max_position_embeddings
    match config.type:
        case RopeScalingType.none:
            return None
        case RopeScalingType.linear:
            return LinearScaling(config.factor)
        case RopeScalingType.llama3:
            return Llama3Scaling(config.factor, config.low_freq_factor, config.high_freq_factor, length)
        case RopeScalingType.dynamic:
            return DynamicScaling(config.factor, length)
        case RopeScalingType.yarn:
            return YarnScaling(
                config.factor, length, config.beta_fast, config.beta_slow, attention_factor=config.attention_factor
            )


def _scaling_config(scaling: Scaling | None) -> RopeScalingConfig:
    if scaling is None:
        return RopeScalingConfig()
    if not getattr(scaling, "truncate", True):
        raise _inexpressible("rotary scaling", scaling)
    types = {
        LinearScaling: RopeScalingType.linear,
        Llama3Scaling: RopeScalingType.llama3,
        DynamicScaling: RopeScalingType.dynamic,
        YarnScaling: RopeScalingType.yarn,
    }
    keys = {field.name for field in fields(RopeScalingConfig)} & {field.name for field in fields(scaling)}
    if type(scaling) is not YarnScaling:
        keys -= {"attention_factor"}  # always 1
    values = {key: getattr(scaling, key) for key in keys}
    lengths = "original_max_position_embeddings"
    values = {key: value if key == lengths else float(value) for key, value in values.items()}
    return RopeScalingConfig(type=types[type(scaling)], **values)


def _activation(function: Any, gated: bool) -> Activation:
    for activation, known in ACTIVATIONS.items():
        same = function is known or (
            isinstance(function, partial)
            and isinstance(known, partial)
            and (function.func, function.keywords) == (known.func, known.keywords)
        )
        if same and gated == (activation is not Activation.gelu):
            return activation
    raise _inexpressible("activation", getattr(function, "__name__", function))


def _global_every(pattern: int | list[int] | None, num_layers: int) -> int | None:
    """Every so many-th layer is global; ``pattern`` can be a list of ones for local layers."""
    if not isinstance(pattern, list):
        return pattern
    if all(pattern):
        return None
    every = pattern.index(0) + 1
    if pattern != [int(layer % every != 0) for layer in range(1, num_layers + 1)]:
        raise _inexpressible("order of local layers", pattern)
    return every


def _inexpressible(what: str, value: Any) -> UserError:
    return UserError(
        f"{what} ({value}) must be expressible by the keys of model: there is none for it. Convert a model without it."
    )
