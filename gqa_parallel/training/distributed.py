"""Process groups, devices and random streams of a run, and the few small things that ranks tell each other."""

import contextlib
import datetime
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

import gqa_parallel.megatron  # noqa: F401 makes Megatron-Core run without CUDA
from gqa_parallel.errors import UserError
from gqa_parallel.training.world import World


@contextlib.contextmanager
def process_groups(world: World, *, tp_size: int, timeout_s: float) -> Iterator[None]:
    """NCCL (CUDA) or gloo, and Megatron-Core's groups, while the context lasts.

    Args:
        world: this process.
        tp_size: tensor-parallel ranks; consecutive ones.
        timeout_s: a collective that waits longer ends the process.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's overlap relies on launch order
        torch.cuda.set_device(world.local_rank)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed reads it
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if world.size == 1 else {}
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        timeout=datetime.timedelta(seconds=timeout_s),
        **alone,
    )
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp_size,
            distributed_timeout_minutes=max(1, round(timeout_s / 60)),
            create_gloo_process_groups=False,
        )
        yield
        dist.barrier()  # nobody leaves while another still needs it
    finally:
        # leaving without this made processes end with code 1 after they had succeeded
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def seed_everything(seed: int) -> None:
    """Equal default streams on all ranks, from which weights are drawn, and one of its own per tensor-parallel rank."""
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def from_rank_0(value: Any) -> Any:
    """Rank 0's ``value`` on every rank. Communication: one small broadcast."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def raise_together(error: Exception | None) -> None:
    """Raise on every rank what one of them has found, so that none waits for it in a collective.

    Args:
        error: this rank's; None: it has none.
    Raises:
        Exception: the error of the lowest rank that has one.

    Communication: one all-gather of the errors.
    """
    errors: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for found in errors:
        if found is not None:
            raise found


def agree(values: Mapping[str, Any]) -> None:
    """Refuse to go on where ranks differ in what must be the same.

    Args:
        values: by name; compared by their texts.
    Raises:
        UserError: on every rank; names the first value that differs, and the rank that differs from rank 0.

    Communication: one all-gather of the texts.
    """
    everyone: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, {name: str(value) for name, value in values.items()})
    for rank, theirs in enumerate(everyone):
        for name, first in everyone[0].items():
            if theirs.get(name) != first:
                raise UserError(
                    f"{name} of rank {rank} ({theirs.get(name)}) must be that of rank 0 ({first}): all ranks train "
                    "one model on one corpus. Start every node with the same command, files and versions."
                )


def mean_over_ranks(*values: torch.Tensor) -> list[float]:
    """Means over all ranks. Communication: one all-reduce of as many numbers."""
    stacked = torch.stack([value.detach().float() for value in values])
    dist.all_reduce(stacked)
    return (stacked / dist.get_world_size()).tolist()
