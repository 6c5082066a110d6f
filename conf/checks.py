"""Configurations that cannot run, refused on every rank before any collective. Needs no torch."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from gqa_parallel.conf.model_shape import head_dim
from gqa_parallel.conf.schema import Config, Normalization, Precision, RopeScalingType
from gqa_parallel.data.blend import check_weights, split_shares
from gqa_parallel.data.sampler import micro_batches_per_step
from gqa_parallel.errors import UserError, one_of
from gqa_parallel.partition.heads import HeadPartition

# what a value must be -> the test, and the keys that it holds for; null passes
_RANGES: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "at least 1": (
        lambda value: value >= 1,
        (
            "model.num_layers",
            "model.hidden_size",
            "model.num_heads",
            "model.num_kv_heads",
            "model.head_dim",
            "model.ffn_hidden_size",
            "model.vocab_size",
            "model.max_position_embeddings",
            "model.rope_scaling.factor",
            "model.rope_scaling.original_max_position_embeddings",
            "model.window",
            "model.global_every",
            "parallel.tp",
            "parallel.cp",
            "optim.decay_steps",
            "train.steps",
            "train.seq_len",
            "train.micro_batch_size",
            "train.global_batch_size",
            "train.log_interval",
            "checkpoint.keep_last",
            "checkpoint.keep_every",
        ),
    ),
    "greater than 0": (
        lambda value: value > 0,
        (
            "model.norm_eps",
            "model.rope_theta",
            "model.rope_fraction",
            "model.local_rope_theta",
            "model.softmax_scale",
            "model.attention_softcap",
            "model.logit_softcap",
            "model.init_std",
            "parallel.timeout_s",
            "optim.lr",
            "optim.eps",
        ),
    ),
    "at least 0": (
        lambda value: value >= 0,
        (
            "optim.min_lr",
            "optim.warmup_steps",
            "optim.weight_decay",
            "optim.clip_grad_norm",
            "data.num_workers",
            "train.seed",
            "train.eval_interval",
            "train.eval_batches",
            "checkpoint.interval",
        ),
    ),
    "at least 0 and less than 1": (
        lambda value: 0 <= value < 1,
        ("model.attention_dropout", "model.hidden_dropout", "optim.beta1", "optim.beta2"),
    ),
    "0, 1, 2 or 3": (lambda value: value in range(4), ("zero.stage",)),
}


def check(config: Config, world_size: int, cuda: bool | None = None) -> None:
    """Refuse a configuration that cannot run.

    Args:
        config: the composed configuration.
        world_size: ranks of the run.
        cuda: whether the run has GPUs; None: unknown, and what depends on it passes.

    Raises:
        UserError: names the first values that contradict each other, and a way out.
    """
    _check_ranges(config)
    _check_ranks(config, world_size)
    _check_model(config)
    _check_variants(config)
    _check_batch(config, world_size)
    _check_schedule(config)
    _check_precision(config, cuda)
    _check_data(config)


def _check_ranges(config: Config) -> None:
    for requirement, (holds, keys) in _RANGES.items():
        for key in keys:
            value = attrgetter(key)(config)
            if value is not None and not holds(value):
                raise UserError(f"{key} ({value}) must be {requirement}.")


def _check_ranks(config: Config, world_size: int) -> None:
    tp, cp = config.parallel.tp, config.parallel.cp
    if cp > 1:
        raise UserError(
            f"parallel.cp ({cp}) must be 1: this attention layer does not support context parallelism yet. "
            "Use parallel.cp=1; parallel.sequence_parallel=true shards the activations outside attention."
        )
    if world_size < 1 or world_size % (tp * cp):
        below = world_size - world_size % (tp * cp)
        counts = [count for count in (below, below + tp * cp) if count > 0]
        ffn = config.model.ffn_hidden_size
        sizes = [n for n in range(1, config.model.num_heads + 1) if world_size > 0 == world_size % n + ffn % n]
        other_tp = f", or use parallel.tp={one_of(sizes)}" if sizes else ""
        raise UserError(
            f"world_size ({world_size}) must be a multiple of parallel.tp ({tp}) x parallel.cp ({cp}): the "
            f"ranks form whole tensor-parallel groups. Start {one_of(counts)} ranks with torchrun --nproc-per-node"
            f"{other_tp}."
        )


def _check_model(config: Config) -> None:
    model, tp, seq_len = config.model, config.parallel.tp, config.train.seq_len
    HeadPartition(model.num_heads, model.num_kv_heads, tp)
    if head_dim(model) % 2:
        raise UserError(
            f"model.head_dim ({head_dim(model)}) must be a multiple of 2: rotary embeddings turn pairs of "
            f"components. Use model.head_dim={_multiples(head_dim(model), 2)}."
        )
    if model.ffn_hidden_size % tp:
        sizes = [size for size in range(1, model.num_heads + 1) if model.ffn_hidden_size % size == 0]
        raise UserError(
            f"model.ffn_hidden_size ({model.ffn_hidden_size}) must be a multiple of parallel.tp ({tp}): the "
            f"ranks hold equal slices of the MLP. Use parallel.tp={one_of(sizes)}, "
            f"or model.ffn_hidden_size={_multiples(model.ffn_hidden_size, tp)}."
        )
    if seq_len > model.max_position_embeddings:
        raise UserError(
            f"train.seq_len ({seq_len}) must be at most model.max_position_embeddings "
            f"({model.max_position_embeddings}): the model is meant for no longer sequence. Use "
            f"train.seq_len={model.max_position_embeddings}, or raise model.max_position_embeddings."
        )
    if config.parallel.sequence_parallel and seq_len % tp:
        raise UserError(
            f"train.seq_len ({seq_len}) must be a multiple of parallel.tp ({tp}) under sequence "
            "parallelism: the ranks hold equal parts of the sequence. Use "
            f"train.seq_len={_multiples(seq_len, tp)}, or parallel.sequence_parallel=false."
        )


def _check_variants(config: Config) -> None:
    model, scaling = config.model, config.model.rope_scaling
    for name in ("global_every", "local_rope_theta"):
        if getattr(model, name) is not None and model.window is None:
            raise UserError(
                f"model.{name} ({getattr(model, name)}) must be null without model.window (null): it tells local "
                f"layers from others. Set model.window, or model.{name}=null."
            )
    rotary_dim = int(model.rope_fraction * head_dim(model))
    if model.rope_fraction > 1 or rotary_dim % 2 or not rotary_dim:
        raise UserError(
            f"model.rope_fraction ({model.rope_fraction}) must leave an even number of the components of "
            f"model.head_dim ({head_dim(model)}), at most all: they turn in pairs. Use model.rope_fraction=1 or "
            f"{max(2, rotary_dim - rotary_dim % 2) / head_dim(model):.4f}."
        )
    needs_length = (RopeScalingType.llama3, RopeScalingType.dynamic, RopeScalingType.yarn)
    if scaling.type in needs_length and scaling.original_max_position_embeddings is None:
        raise UserError(
            f"model.rope_scaling.original_max_position_embeddings (null) must be set for model.rope_scaling.type "
            f"({scaling.type.value}): it stretches from that length. Set it to the length first trained at."
        )
    if scaling.type is RopeScalingType.none and scaling.factor != 1:
        raise UserError(
            f"model.rope_scaling.factor ({scaling.factor}) must be 1 for model.rope_scaling.type (none): nothing would "
            "read it. Set model.rope_scaling.type."
        )
    if model.zero_centered_norm and model.normalization is not Normalization.rmsnorm:
        raise UserError(
            f"model.normalization ({model.normalization.value}) must be rmsnorm with model.zero_centered_norm (true): "
            "only RMSNorm has that form. Use model.zero_centered_norm=false."
        )


def _check_batch(config: Config, world_size: int) -> None:
    dp_size = world_size // (config.parallel.tp * config.parallel.cp)
    micro_batches_per_step(config.train.global_batch_size, config.train.micro_batch_size, dp_size)


def _check_schedule(config: Config) -> None:
    optim, steps = config.optim, config.train.steps
    if optim.min_lr > optim.lr:
        raise UserError(
            f"optim.min_lr ({optim.min_lr}) must be at most optim.lr ({optim.lr}): the learning rate decays "
            f"from lr to min_lr. Use optim.min_lr={optim.lr / 10:g}."
        )
    end_name, end = ("optim.decay_steps", optim.decay_steps) if optim.decay_steps else ("train.steps", steps)
    if optim.warmup_steps is not None and optim.warmup_steps >= end:
        raise UserError(
            f"optim.warmup_steps ({optim.warmup_steps}) must be less than {end_name} ({end}): the decay "
            f"follows the warm-up. Use optim.warmup_steps={end // 10}."
        )


def _check_precision(config: Config, cuda: bool | None) -> None:
    precision, stage = config.train.precision, config.zero.stage
    if precision is Precision.fp16 and cuda is False:
        raise UserError(
            "train.precision (fp16) must be bf16, fp32 or auto without CUDA (none found): fp16 is for "
            "GPUs. Use train.precision=auto."
        )
    sixteen_bits = precision in (Precision.bf16, Precision.fp16) or (precision is Precision.auto and cuda)
    if stage == 0 and sixteen_bits:
        name = "auto, bf16 on CUDA" if precision is Precision.auto else precision.value
        raise UserError(
            f"zero.stage (0) must be at least 1 for train.precision ({name}): DeepSpeed's 16-bit optimizers "
            "outside ZeRO take a wrong gradient norm under tensor parallelism. Use zero.stage=1 or "
            "train.precision=fp32."
        )


def _check_data(config: Config) -> None:
    data, train = config.data, config.train
    check_weights(data.paths, data.weights)
    _, validation, _ = split_shares(data.split)
    if train.eval_batches and not validation:
        raise UserError(
            f"data.split ({data.split}) must leave a share for validation, its second value, while "
            f"train.eval_batches ({train.eval_batches}) asks for evaluation. "
            f"Use \"data.split='95,5,0'\", or train.eval_batches=0."
        )


def _multiples(value: int, of: int) -> str:
    """The multiples of ``of`` next to ``value``."""
    below = value - value % of
    return one_of([multiple for multiple in (below, below + of) if multiple])
