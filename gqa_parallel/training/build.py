"""From the typed configuration to the objects that train: Megatron config, model, optimizer, schedule, engine."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from gqa_parallel.checkpoint.families.family import ModelArguments
from gqa_parallel.conf.schema import Config, Precision, Recompute
from gqa_parallel.data.sampler import micro_batches_per_step
from gqa_parallel.deepspeed.config import deepspeed_config
from gqa_parallel.deepspeed.engine import DeepSpeedEngine, deepspeed_engine
from gqa_parallel.megatron.config import GQATransformerConfig
from gqa_parallel.megatron.model import GQAModel, build_gpt, weight_decay_groups
from gqa_parallel.training.model_arguments import model_arguments_of

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


def transformer_config(config: Config, arguments: ModelArguments) -> GQATransformerConfig:
    """The model's settings, with Megatron-Core's names for the ``parallel`` and ``train`` groups."""
    precision = precision_of(config)
    recompute = {
        Recompute.none: {},
        Recompute.selective: {"recompute_granularity": "selective"},
        Recompute.full: {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    }
    return GQATransformerConfig(
        **arguments.config,
        tensor_model_parallel_size=config.parallel.tp,
        sequence_parallel=config.parallel.sequence_parallel and config.parallel.tp > 1,
        params_dtype=DTYPES[precision],
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        **recompute[config.train.recompute],
    )


def build_trainee(
    config: Config, vocab_size: int, initialize: Callable[[GQAModel], None] = lambda model: None
) -> Trainee:
    """Model, AdamW, warm-up and cosine decay, and the DeepSpeed engine around them.

    Args:
        config: checked; the process groups exist and the seeds are set.
        vocab_size: the tokenizer's or the model's, without padding.
        initialize: sets weights other than the random ones, before the engine copies them.
    """
    optim, dp_size = config.optim, parallel_state.get_data_parallel_world_size()
    arguments = model_arguments_of(config.model, vocab_size)
    model = build_gpt(
        transformer_config(config, arguments), **arguments.gpt | {"max_sequence_length": config.train.seq_len}
    )
    initialize(model)
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
