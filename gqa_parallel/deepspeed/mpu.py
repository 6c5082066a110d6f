"""Megatron-Core's process groups as the ``mpu`` object that DeepSpeed asks for."""

import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import ProcessGroup


class MegatronMPU:
    """DeepSpeed's "model parallel unit" over ``megatron.core.parallel_state``, which must be initialised.

    DeepSpeed's model-parallel group is the tensor-parallel one; its data-parallel group, over which ZeRO shards and
    gradients are averaged, contains the context-parallel ranks, since they too see different tokens.
    """

    def get_model_parallel_group(self) -> ProcessGroup:
        return parallel_state.get_tensor_model_parallel_group()

    def get_model_parallel_rank(self) -> int:
        return self.get_model_parallel_group().rank()

    def get_model_parallel_world_size(self) -> int:
        return self.get_model_parallel_group().size()

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_group(self) -> ProcessGroup:
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_rank(self) -> int:
        return self.get_data_parallel_group().rank()

    def get_data_parallel_world_size(self) -> int:
        return self.get_data_parallel_group().size()

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.get_data_parallel_group())
