"""One run at a time in a run directory."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from gqa_parallel.errors import UserError
from gqa_parallel.training.distributed import raise_together

LOCK = ".lock"


@contextlib.contextmanager
def sole_run(run_dir: Path) -> Iterator[None]:
    """Keep other runs out of the directory while the context lasts; every rank enters it, rank 0 holds the lock.

    The operating system lets go of it when the process ends, however it ends. A file system without locks locks
    nothing.

    Raises:
        UserError: on every rank: another process holds it.
    """
    descriptor, error = None, None
    if dist.get_rank() == 0:
        # fcntl's lock, not flock's: child processes that outlive a killed rank do not hold on to it
        descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as refused:
            if refused.errno in (errno.EACCES, errno.EAGAIN):
                holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
                error = UserError(
                    f"run_dir ({run_dir}) must belong to one run at a time: {holder} is training in it. "
                    "Use another run_dir, or end that run first."
                )
        else:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} of {socket.gethostname()}\n".encode(), 0)
    try:
        raise_together(error)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
