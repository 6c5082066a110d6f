"""Pools of gloo ranks, forked after one import and shared by the tests of the same layout."""

import datetime
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

START_TIMEOUT_S = 60
# once a rank has failed, the others wait for it in a collective: they get this long to fail by themselves
GRACE_S = 2


class RankError(AssertionError):
    """What the ranks raised, with their tracebacks."""


class Ranks:
    """``world_size`` processes with an initialised gloo group and Megatron's groups for ``tp_size``."""

    def __init__(self, world_size: int, tp_size: int) -> None:
        context = multiprocessing.get_context("fork")
        self.alive = True
        self._store = tempfile.NamedTemporaryFile(prefix="gqa-ranks-")  # noqa: SIM115 it lives as long as the ranks
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, world_size, tp_size, self._store.name), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._collect(START_TIMEOUT_S)

    def __call__(self, function: Callable, *args: Any, timeout: float = 60) -> list:
        """Run ``function(*args)`` on every rank.

        Args:
            function: at the top level of a module.
            timeout: seconds until all must have answered; then the ranks are killed.
        Returns:
            Each rank's result.
        Raises:
            RankError: a rank raised or did not answer.
        """
        for pipe in self._pipes:
            pipe.send((function, args))
        return self._collect(timeout)

    def _collect(self, timeout: float) -> list:
        deadline = time.monotonic() + timeout
        answers: dict[int, tuple[bool, Any]] = {}
        while len(answers) < len(self._pipes) and time.monotonic() < deadline:
            for rank, pipe in enumerate(self._pipes):
                if rank not in answers and pipe.poll(0.001):
                    try:
                        answers[rank] = pipe.recv()
                    except EOFError:
                        answers[rank] = (False, "the process died")
                    if not answers[rank][0]:
                        deadline = min(deadline, time.monotonic() + GRACE_S)
        failures = {rank: answer for rank, (succeeded, answer) in answers.items() if not succeeded}
        missing = sorted(set(range(len(self._pipes))) - set(answers))
        if failures or missing:
            self.close()
            reports = [f"rank {rank}: {text}" for rank, text in sorted(failures.items())]
            raise RankError("\n".join([*reports, *([f"no answer from ranks {missing}"] if missing else [])]))
        return [answers[rank][1] for rank in range(len(self._pipes))]

    def close(self) -> None:
        self.alive = False
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def _serve(pipe: Connection, rank: int, world_size: int, tp_size: int, store: str) -> None:
    # the parent kills its daemons; a daemon itself may not start processes, as Megatron's checkpoint writer does
    multiprocessing.current_process()._config["daemon"] = False
    try:
        _initialize(rank, world_size, tp_size, store)
        pipe.send((True, None))
    except Exception:
        pipe.send((False, traceback.format_exc()))
        return
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            pipe.send((True, function(*args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


def _initialize(rank: int, world_size: int, tp_size: int, store: str) -> None:
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp_size, create_gloo_process_groups=False)


class RankPools:
    """The running pools, one for each (world size, tp size)."""

    def __init__(self) -> None:
        self._pools: dict[tuple[int, int], Ranks] = {}

    def __call__(self, world_size: int, tp_size: int | None = None) -> Ranks:
        key = (world_size, tp_size or world_size)
        if key not in self._pools or not self._pools[key].alive:
            self._pools[key] = Ranks(*key)
        return self._pools[key]

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
