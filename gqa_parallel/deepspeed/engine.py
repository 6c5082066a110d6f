"""A DeepSpeed engine that trains a Megatron-Core model correctly under tensor parallelism."""

from typing import Any

import deepspeed
import deepspeed.ops
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.utils import clip_grad_norm_
from megatron.core import parallel_state
from torch import nn

from gqa_parallel.attention.shared_parameters import mark_owners, sum_shared_gradients
from gqa_parallel.deepspeed.mpu import MegatronMPU
from gqa_parallel.errors import UserError


def deepspeed_engine(
    model: nn.Module,
    config: dict[str, Any],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    lr_scheduler: Any = None,
) -> DeepSpeedEngine:
    """``deepspeed.initialize`` with everything that makes it right for tensor-parallel parameters.

    Without it DeepSpeed would broadcast rank 0's shards over all ranks, let the ranks' QK-norm and replicated KV
    weights drift apart, and count parameters wrongly in the gradient norm that it clips by.

    Args:
        model: a Megatron-Core model on its device; ``parallel_state`` is initialised.
        config: DeepSpeed's configuration. ZeRO 1 to 3 train in any precision, stage 0 in fp32.
        optimizer: None: DeepSpeed builds the one that ``config`` names.
        lr_scheduler: stepped by the engine, if given.
    Returns:
        The engine. Its ``get_global_grad_norm()`` is the norm of the whole gradient before clipping, at every stage.
        At stage 0 it is known only where clipping is on.
    Raises:
        UserError: ``config`` asks for a combination that DeepSpeed computes wrongly, or that would collide with ours.

    Communication: DeepSpeed's own, and per backward pass that of ``sum_shared_gradients``.
    """
    _refuse(config)
    tp_group = parallel_state.get_tensor_model_parallel_group()
    if not torch.cuda.is_available():
        # this op would be compiled at start-up; a run killed meanwhile leaves a lock on which all later ones wait
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    mark_owners(model, tp_group)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        config=config,
        mpu=MegatronMPU(),
        dist_init_required=False,
    )
    sum_shared_gradients(engine.module, tp_group)
    if engine.zero_optimization_stage() == 0:
        _report_norm_of_stage_0(engine)
    return engine


def _refuse(config: dict[str, Any]) -> None:
    stage = config.get("zero_optimization", {}).get("stage", 0)
    for precision in ("bf16", "fp16"):
        if stage == 0 and config.get(precision, {}).get("enabled", False):
            raise UserError(
                f"zero_optimization.stage ({stage}) must be 1, 2 or 3 with {precision}: at stage 0 DeepSpeed's "
                "low-precision optimizers count tensor-parallel gradients wrongly in the norm. "
                "Use stage 1 or fp32."
            )
    if config.get("wandb", {}).get("enabled", False):
        raise UserError(
            "wandb.enabled (True) must be false in the DeepSpeed configuration: DeepSpeed would start a run of its own "
            "on every call. Log with wandb.* of the training configuration."
        )
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        raise UserError(
            f"pipeline_model_parallel_size ({parallel_state.get_pipeline_model_parallel_world_size()}) must be 1 with "
            "deepspeed_engine: DeepSpeed's engine runs the whole model in one stage. Use tensor parallelism and ZeRO."
        )


def _report_norm_of_stage_0(engine: DeepSpeedEngine) -> None:
    """DeepSpeed clips fp32 gradients at stage 0 but forgets their norm."""

    def clip_and_remember() -> None:
        norm = clip_grad_norm_(engine.module.parameters(), max_norm=engine.gradient_clipping(), mpu=engine.mpu)
        engine._global_grad_norm = norm.item()

    engine.clip_fp32_gradients = clip_and_remember
