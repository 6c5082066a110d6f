"""From the typed configuration to the objects that train: Megatron config, model, optimizer, schedule, engine."""

from dataclasses import dataclass
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.nn import functional as F

from gqa_parallel.attention.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    Rope,
    Scaling,
    YarnScaling,
)
from gqa_parallel.conf.model_shape import head_dim
from gqa_parallel.conf.schema import (
    Activation,
    Config,
    Normalization,
    Precision,
    Recompute,
    RopeScalingConfig,
    RopeScalingType,
)
from gqa_parallel.data.sampler import micro_batches_per_step
from gqa_parallel.deepspeed.config import deepspeed_config
from gqa_parallel.deepspeed.engine import DeepSpeedEngine, deepspeed_engine
from gqa_parallel.megatron.config import GQATransformerConfig
from gqa_parallel.megatron.model import build_gpt, weight_decay_groups
from gqa_parallel.megatron.variant import GPTVariant

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Trainee:
    """A model under training: the engine owns weights and optimizer, the schedule sets the learning rate."""

    engine: DeepSpeedEngine
    schedule: OptimizerParamScheduler


def precision_of(config: Config) -> str:
    """``train.precision``, with ``auto`` decided: bf16 on CUDA, fp32 on the CPU."""
    if config.train.precision is Precision.auto:
        return "bf16" if torch.cuda.is_available() else "fp32"
    return config.train.precision.value


def transformer_config(config: Config) -> GQATransformerConfig:
    """Megatron-Core's names for the ``model``, ``parallel`` and ``train`` groups."""
    model, precision = config.model, precision_of(config)
    recompute = {
        Recompute.none: {},
        Recompute.selective: {"recompute_granularity": "selective"},
        Recompute.full: {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    }
    activations = {
        Activation.swiglu: F.silu,
        Activation.geglu: partial(F.gelu, approximate="tanh"),
        Activation.gelu: F.gelu,
    }
    rope = Rope(model.rope_theta, model.rope_fraction, _scaling(model.rope_scaling))
    local_theta = model.local_rope_theta
    return GQATransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=head_dim(model),
        ffn_hidden_size=model.ffn_hidden_size,
        gated_linear_unit=model.activation is not Activation.gelu,
        activation_func=activations[model.activation],
        rope=rope,
        local_rope=None if local_theta is None else Rope(local_theta, model.rope_fraction),
        window_size=None if model.window is None else (model.window - 1, 0),
        window_attn_skip_freq=model.global_every,
        softmax_scale=model.softmax_scale,
        softmax_type="learnable" if model.sinks else "vanilla",
        attention_softcap=model.attention_softcap,
        attention_output_gate=model.output_gate,
        layernorm_zero_centered_gamma=model.zero_centered_norm,
        normalization="RMSNorm" if model.normalization is Normalization.rmsnorm else "LayerNorm",
        layernorm_epsilon=model.norm_eps,
        add_qkv_bias=model.qkv_bias,
        add_bias_linear=model.linear_bias,
        qk_layernorm=model.qk_norm,
        attention_dropout=model.attention_dropout,
        hidden_dropout=model.hidden_dropout,
        init_method_std=model.init_std,
        tensor_model_parallel_size=config.parallel.tp,
        sequence_parallel=config.parallel.sequence_parallel and config.parallel.tp > 1,
        params_dtype=DTYPES[precision],
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        **recompute[config.train.recompute],
    )


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


def build_trainee(config: Config, vocab_size: int) -> Trainee:
    """Model, AdamW, warm-up and cosine decay, and the DeepSpeed engine around them.

    Args:
        config: checked; the process groups exist and the seeds are set.
        vocab_size: the tokenizer's or the model's, without padding.
    """
    optim, dp_size = config.optim, parallel_state.get_data_parallel_world_size()
    model = build_gpt(
        transformer_config(config),
        vocab_size=vocab_size,
        max_sequence_length=config.train.seq_len,
        tie_embeddings=config.model.tie_embeddings,
        variant=GPTVariant(
            embedding_multiplier=config.model.embedding_multiplier,
            post_norms=config.model.post_norms,
            residual_multiplier=config.model.residual_multiplier,
            logit_multiplier=config.model.logit_multiplier,
            logit_softcap=config.model.logit_softcap,
        ),
    )
    optimizer = torch.optim.AdamW(
        weight_decay_groups(model),
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=torch.cuda.is_available(),
    )
    decay_steps = optim.decay_steps or config.train.steps
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=decay_steps // 10 if optim.warmup_steps is None else optim.warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style="cosine",
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=decay_steps,
        wd_incr_style="constant",
        # a resumed run keeps its place in the schedule, but follows the schedule that is configured now
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    engine = deepspeed_engine(
        model,
        deepspeed_config(
            stage=config.zero.stage,
            precision=precision_of(config),
            micro_batch_size=config.train.micro_batch_size,
            micro_batches_per_step=micro_batches_per_step(
                config.train.global_batch_size, config.train.micro_batch_size, dp_size
            ),
            dp_size=dp_size,
            clip_grad_norm=optim.clip_grad_norm,
        ),
        optimizer=optimizer,
    )
    return Trainee(engine, schedule)
