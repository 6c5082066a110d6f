"""Saving and finding checkpoints without a model; run inside the ranks, or in a process that is killed."""

import errno
import logging
import os
import random
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist

from gqa_parallel.checkpoint import store
from gqa_parallel.checkpoint.native import Part
from gqa_parallel.conf.schema import CheckpointConfig
from gqa_parallel.errors import UserError
from gqa_parallel.training import checkpoint, saver
from gqa_parallel.training.saver import Saver

IDENTITY = {"model": {"num_layers": 2}, "data": {"seed": 7}}
ROWS = 6


def description(step: int) -> checkpoint.Description:
    return checkpoint.Description(
        step=step,
        **IDENTITY,
        layout={},
        consumed_samples=step,
        optimizer_steps=step,
        schedule={},
        loss_scale={},
        wandb_run_id=None,
        val_loss=None,
        best_val_loss=None,
        config={},
        versions=saver.library_versions(),
    )


def begin(using: Saver, step: int, columns: int = 5) -> None:
    """A checkpoint of one tensor, of which every rank has some rows, full of the step's number."""
    mine = list(range(ROWS))[dist.get_rank() :: dist.get_world_size()]
    parts = [Part("w", (ROWS, columns), 0, row, torch.full((1, columns), float(step))) for row in mine]
    with (
        mock.patch.object(saver.state, "take_parts", lambda engine: parts),
        mock.patch.object(saver, "random_states", list),
    ):
        using.begin(SimpleNamespace(engine=None), description(step))


def save(run_dir: Path, steps: list[int], **config) -> None:
    using = Saver(run_dir, CheckpointConfig(**config))
    for step in steps:
        begin(using, step)
    using.finish()


def refused_save(run_dir: Path, step: int, full: bool) -> str:
    """The message of a save that rank 1's disk (``full``), or the folder, refuses."""
    using = Saver(run_dir, CheckpointConfig(keep_last=1))

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC if full else errno.EROFS, os.strerror(errno.ENOSPC if full else errno.EROFS), "disk")

    target = (saver, "write_file") if full else (store.Path, "mkdir")
    try:
        with mock.patch.object(*target, refuse) if dist.get_rank() == int(full) else mock.MagicMock():
            begin(using, step)
            using.finish()
    except UserError as error:
        return str(error)
    return ""


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def found(run_dir: Path, resume: str = "auto", model: dict | None = None) -> dict:
    """What ``find`` answers: ``step``, ``error``, and the ``warnings`` meanwhile."""
    messages = _Messages()
    logger = logging.getLogger("gqa_parallel")
    logger.addHandler(messages)
    answer = {"step": None, "error": None, "warnings": messages.texts}
    try:
        result = checkpoint.find(resume, run_dir, {**IDENTITY, **({"model": model} if model else {})})
        answer["step"] = result and result.description.step
    except UserError as error:
        answer["error"] = str(error)
    finally:
        logger.removeHandler(messages)
    return answer


def save_for_ever(run_dir: Path, first: int, acknowledge: int, keep_last: int | None) -> None:
    """Save step after step, telling the file descriptor ``acknowledge`` of each that is complete."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    using = Saver(run_dir, CheckpointConfig(keep_last=keep_last))
    device = torch.device("cpu")
    for step in range(first, first + 10_000):
        begin(using, step, columns=20_000)
        while not using.written(device) and random.random() < 0.9:
            time.sleep(1e-4)
        using.finish()
        os.write(acknowledge, f"{step}\n".encode())
