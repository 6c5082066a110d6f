"""Whether the copies of shared parameters are still equal."""

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from gqa_parallel.attention.shared_parameters import shared_parameters


@torch.no_grad()
def differing_copies(engine: DeepSpeedEngine) -> list[str]:
    """Names of the shared parameters whose copies are not bit-equal on the ranks that hold them.

    Every rank names its own; call it on all ranks.

    Communication: per shared parameter, one all-gather over its group (ZeRO 3: and one over data parallelism).
    """
    differing = []
    for name, parameter, group in shared_parameters(engine.module, engine.mpu.get_tensor_model_parallel_group()):
        with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_optimization_stage() == 3):
            copies = [torch.empty_like(parameter) for _ in range(group.size())]
            dist.all_gather(copies, parameter.detach().contiguous(), group=group)
        if any(not torch.equal(copy, copies[0]) for copy in copies):
            differing.append(name)
    return differing
