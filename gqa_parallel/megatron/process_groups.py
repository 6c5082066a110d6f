"""The process groups inside a tensor-parallel group that share replicated KV heads."""

import contextlib
import functools
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from gqa_parallel.partition.heads import HeadPartition


@functools.cache
def subgroup(tp_group: ProcessGroup, tp_ranks: range) -> ProcessGroup:
    """The group of ``tp_ranks``, ranks of ``tp_group``, with its timeout; only they call. Made once per process.

    Communication: the first call synchronises ``tp_ranks`` through the store.
    """
    if len(tp_ranks) == tp_group.size():
        return tp_group
    ranks = [dist.get_global_rank(tp_group, rank) for rank in tp_ranks]
    timeout = tp_group._get_backend(torch.empty(0, device=torch.cuda.current_device()).device).options._timeout
    with _unbound_world():
        return dist.new_group(ranks, timeout=timeout, use_local_synchronization=True, group_desc="kv_replicas")


@contextlib.contextmanager
def _unbound_world() -> Iterator[None]:
    """A world that is bound to a device makes new NCCL groups by splitting its own, which all its ranks must join."""
    world = dist.group.WORLD
    device, world.bound_device_id = world.bound_device_id, None
    try:
        yield
    finally:
        world.bound_device_id = device


def kv_replica_group(partition: HeadPartition, tp_group: ProcessGroup) -> ProcessGroup:
    """The ranks that hold the same KV heads as this one."""
    return subgroup(tp_group, partition.kv_replica_ranks(tp_group.rank()))


def alone_group(tp_group: ProcessGroup) -> ProcessGroup:
    """This rank by itself: a Megatron linear built on it communicates nothing."""
    return subgroup(tp_group, range(tp_group.rank(), tp_group.rank() + 1))
