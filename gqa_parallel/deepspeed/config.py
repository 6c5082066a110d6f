"""DeepSpeed's configuration as a function of the few numbers that a run decides."""

from typing import Any, Literal


def deepspeed_config(
    *,
    stage: int,
    precision: Literal["fp32", "bf16", "fp16"],
    micro_batch_size: int,
    micro_batches_per_step: int,
    dp_size: int,
    clip_grad_norm: float,
) -> dict[str, Any]:
    """
    Args:
        stage: ZeRO stage, 0 to 3 (arXiv:1910.02054).
        precision: of parameters and gradients; the optimizer keeps fp32.
        micro_batch_size: sequences per data-parallel rank and forward pass.
        micro_batches_per_step: forward passes per optimizer step.
        dp_size: data-parallel ranks.
        clip_grad_norm: largest gradient norm; 0: no clipping.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": micro_batches_per_step,
        "train_batch_size": micro_batch_size * micro_batches_per_step * dp_size,
        "gradient_clipping": clip_grad_norm,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 2**31,  # the loop reports
    }
    if precision != "fp32":
        config[precision] = {"enabled": True}
    return config
