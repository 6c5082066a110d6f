"""Going on from a checkpoint: which one, whether it is of this run's model and data, and restoring it."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from gqa_parallel.checkpoint import state
from gqa_parallel.checkpoint.native import DamagedCheckpoint, NativeCheckpoint, Part
from gqa_parallel.checkpoint.store import locate
from gqa_parallel.errors import UserError
from gqa_parallel.training.build import Trainee
from gqa_parallel.training.distributed import from_rank_0, raise_together, seed_everything

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Description:
    """What a checkpoint is of.

    Attributes:
        step: optimizer steps done.
        model: what the weights mean.
        data: what the next samples follow from.
        layout: how ranks were arranged; another one can go on.
        consumed_samples: of the training data.
        optimizer_steps: updates that the optimizer did; fewer than ``step`` where fp16 overflowed.
        schedule: state of the learning-rate schedule.
        loss_scale: state of fp16's loss scaler.
        wandb_run_id: the run's, if it is tracked.
        val_loss: newest validation loss, nats per token.
        best_val_loss: lowest validation loss so far, nats per token.
        config: the resolved configuration.
        versions: of the libraries that wrote it.
    """

    step: int
    model: dict[str, Any]
    data: dict[str, Any]
    layout: dict[str, Any]
    consumed_samples: int
    optimizer_steps: int
    schedule: dict[str, Any]
    loss_scale: dict[str, float]
    wandb_run_id: str | None
    val_loss: float | None
    best_val_loss: float | None
    config: dict[str, Any]
    versions: dict[str, str]


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from."""

    checkpoint: NativeCheckpoint
    description: Description

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder


def find(resume: str, run_dir: Path, identity: dict[str, dict[str, Any]]) -> Found | None:
    """The checkpoint to go on from, every byte of it compared with its checksum; on every rank.

    Args:
        resume: ``auto``: the newest undamaged one of ``run_dir``, if there is any checkpoint; ``none``: start anew;
            else a checkpoint folder, a run directory, or its ``checkpoints``.
        run_dir: of this run.
        identity: ``model`` and ``data`` of this run.
    Raises:
        UserError: on every rank: there is none, it is damaged, or it is of another model or other data.

    Communication: small objects from all ranks to all.
    """
    folders: list[Path] = []
    error = None
    if dist.get_rank() == 0:
        try:
            folders = locate(resume, run_dir)
        except UserError as raised:
            error = raised
    raise_together(error)
    folders = from_rank_0(folders)
    for folder in folders:
        try:
            found = _verified(folder)
        except DamagedCheckpoint as damage:
            if resume != "auto" or folder == folders[-1]:
                raise
            logger.warning("skipped a checkpoint: %s", damage)
            continue
        check_matches(folder, found.description, identity)
        return found
    return None


def _verified(folder: Path) -> Found:
    """
    Raises:
        DamagedCheckpoint: on every rank.
    """
    found, error = None, None
    try:
        checkpoint = NativeCheckpoint(folder)
        checkpoint.verify(checkpoint.files[dist.get_rank() :: dist.get_world_size()])
        found = Found(checkpoint, Description(**checkpoint.description))
    except DamagedCheckpoint as damage:
        error = damage
    except TypeError as unknown:
        error = DamagedCheckpoint(
            f"the checkpoint {folder} must be of a training run: {unknown}. "
            "Resume from another one, or use resume=none."
        )
    raise_together(error)
    return found


def check_matches(folder: Path, found: Description, identity: dict[str, dict[str, Any]]) -> None:
    """
    Args:
        folder: the checkpoint's.
        found: what it is of.
        identity: ``model`` and ``data`` of this run.
    Raises:
        UserError: the checkpoint is of another model or other data; names what differs.
    """
    for what, ours in identity.items():
        theirs = getattr(found, what)
        differing = [key for key in sorted({*theirs, *ours}) if theirs.get(key) != ours.get(key)]
        if differing:
            pairs = ", ".join(f"{key} {theirs.get(key)} there and {ours.get(key)} here" for key in differing)
            way_out = {
                "model": "Use the configuration that it was trained with, or another run_dir.",
                "data": "Go on with the data that it was reading, or start anew in another run_dir.",
            }[what]
            raise UserError(f"the checkpoint {folder} must be of this {what}: it has {pairs}. {way_out}")


def load(found: Found, trainee: Trainee, seed: int) -> None:
    """Restore weights, optimizer, schedule and random states; on every rank.

    Args:
        found: from ``find``.
        trainee: has not trained.
        seed: of the run; random streams of another layout are derived from it and the step.
    Raises:
        UserError: on every rank: a tensor is missing, or of another shape or dtype.

    Communication: that of ``state.publish``, and small objects.
    """
    engine, description = trainee.engine, found.description
    error = None
    try:
        state.put_state(engine, found.checkpoint, description.optimizer_steps)
    except DamagedCheckpoint as damage:
        error = damage
    raise_together(error)
    state.publish(engine)
    state.set_loss_scale(engine, description.loss_scale)
    engine.global_steps = description.step
    engine.global_samples = description.consumed_samples
    engine.micro_steps = description.step * engine.gradient_accumulation_steps()
    engine.skipped_steps = description.step - description.optimizer_steps
    trainee.schedule.load_state_dict(description.schedule)

    if description.layout == layout():
        _restore(found.checkpoint)
    else:
        logger.info(
            "the checkpoint's layout was %s, this one is %s: random streams (dropout) start anew from train.seed and "
            "the step",
            description.layout,
            layout(),
        )
        seed_everything(seed + description.step)


def layout() -> dict[str, int]:
    """How the ranks are arranged, as far as their random streams follow from it."""
    return {
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "dp": parallel_state.get_data_parallel_world_size(),
    }


def random_states() -> list[Part]:
    """This rank's random streams, as tensors of a checkpoint."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    states |= {f"stream/{name}": stream for name, stream in get_cuda_rng_tracker().get_states().items()}
    prefix = _random_prefix()
    return [Part(prefix + name, tuple(data.shape), 0, 0, data.cpu().clone()) for name, data in states.items()]


def _restore(checkpoint: NativeCheckpoint) -> None:
    prefix = _random_prefix()
    states = {
        name.removeprefix(prefix): checkpoint.read_whole(name) for name in checkpoint.tensors if name.startswith(prefix)
    }
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    tracker = get_cuda_rng_tracker()
    streams = tracker.get_states()
    tracker.set_states({name: states.get(f"stream/{name}", stream) for name, stream in streams.items()})


def _random_prefix() -> str:
    return f"random/rank-{dist.get_rank():05d}/"
