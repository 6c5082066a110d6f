"""Periodic checkpoints of a run, and resuming it in the same layout.

``run_dir/checkpoints/step-00000100/`` holds what DeepSpeed stores, the random states of every rank, and
``checkpoint.json``, which says what it is a checkpoint of. ``run_dir/checkpoints/latest`` names the newest complete
one: it changes only when every rank has written its part.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from gqa_parallel.errors import UserError
from gqa_parallel.training.build import Trainee

DESCRIPTION = "checkpoint.json"
LATEST = "latest"


@dataclass(frozen=True)
class Description:
    """What a checkpoint is of.

    Attributes:
        step: optimizer steps done.
        consumed_samples: sequences read, over all ranks.
        model: what decides the shapes of the weights.
        layout: how weights and optimizer are spread over ranks.
        wandb_run_id: the run's, if it is tracked.
        best_val_loss: lowest validation loss so far, nats per token.
    """

    step: int
    consumed_samples: int
    model: dict[str, Any]
    layout: dict[str, Any]
    wandb_run_id: str | None = None
    best_val_loss: float | None = None


def find_checkpoint(resume: str, run_dir: Path) -> Path | None:
    """The checkpoint folder to go on from.

    Args:
        resume: ``auto``: the newest of ``run_dir``, if there is one; ``none``: start anew; else a checkpoint folder,
            a run directory, or its ``checkpoints``.
        run_dir: of this run.
    Raises:
        UserError: the folder holds no complete checkpoint.
    """
    if resume == "none":
        return None
    if resume == "auto":
        return _latest(run_dir / "checkpoints")
    given = Path(resume).expanduser()
    if (given / DESCRIPTION).is_file():
        return given
    found = _latest(given) or _latest(given / "checkpoints")
    if found is None:
        raise UserError(
            f"resume ({resume}) must be a checkpoint folder or a run directory with one: it holds neither "
            f"{DESCRIPTION} nor a complete checkpoint. Use resume=auto to start anew where there is none."
        )
    return found


def _latest(checkpoints: Path) -> Path | None:
    pointer = checkpoints / LATEST
    if not pointer.is_file():
        return None
    folder = checkpoints / pointer.read_text(encoding="utf-8").strip()
    if folder.parent != checkpoints or not (folder / DESCRIPTION).is_file():
        raise UserError(
            f"{pointer} ({folder.name}) must name a complete checkpoint beside it: {folder / DESCRIPTION} is missing. "
            "Write the name of another step folder into it, or use resume=none."
        )
    return folder


def describe(folder: Path) -> Description:
    """Read what the checkpoint in ``folder`` is of.

    Raises:
        UserError: the description cannot be read.
    """
    path = folder / DESCRIPTION
    try:
        return Description(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} must describe a checkpoint: {error}. Resume from another step, or use resume=none."
        ) from error


def check_matches(folder: Path, found: Description, model: dict[str, Any], layout: dict[str, Any]) -> None:
    """
    Raises:
        UserError: the checkpoint is of another model, or of another layout; names what differs.
    """
    for what, theirs, ours in (("model", found.model, model), ("layout", found.layout, layout)):
        differing = [key for key in sorted({*theirs, *ours}) if theirs.get(key) != ours.get(key)]
        if differing:
            pairs = ", ".join(f"{key} {theirs.get(key)} there and {ours.get(key)} here" for key in differing)
            way_out = (
                "Use the configuration that it was trained with, or another run_dir."
                if what == "model"
                else "Resume with the layout that it was saved in."
            )
            raise UserError(f"the checkpoint {folder} must be of this {what}: it has {pairs}. {way_out}")


def save(run_dir: Path, trainee: Trainee, description: Description) -> Path:
    """Write a checkpoint; on every rank.

    Returns:
        The folder. Until all ranks have written theirs, ``latest`` names the one before.
    """
    checkpoints = run_dir / "checkpoints"
    name = f"step-{description.step:08d}"
    trainee.engine.save_checkpoint(
        str(checkpoints), tag=name, client_state={"schedule": trainee.schedule.state_dict()}, save_latest=False
    )
    folder = checkpoints / name
    torch.save(_random_states(), _random_states_path(folder))
    dist.barrier()
    if dist.get_rank() == 0:
        _write(folder / DESCRIPTION, json.dumps(asdict(description), indent=2) + "\n")
        _write(checkpoints / LATEST, name + "\n")
    dist.barrier()
    return folder


def load(folder: Path, trainee: Trainee) -> None:
    """Restore weights, optimizer, schedule and random states; on every rank.

    Raises:
        UserError: a file of this rank is missing or cannot be read.
    """
    try:
        loaded, client_state = trainee.engine.load_checkpoint(str(folder.parent), tag=folder.name)
        trainee.schedule.load_state_dict(client_state["schedule"])
        _restore(torch.load(_random_states_path(folder), weights_only=True))
    except (OSError, KeyError, RuntimeError, EOFError, AssertionError) as error:
        raise UserError(
            f"the checkpoint {folder} must be whole: {type(error).__name__}: {error}. "
            "Write the name of another step folder into checkpoints/latest, or use resume=none."
        ) from error
    if loaded is None:
        raise UserError(f"the checkpoint {folder} must hold a model: DeepSpeed found none. Use resume=none.")


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _random_states_path(folder: Path) -> Path:
    return folder / f"random_states_{dist.get_rank():05d}.pt"


def _random_states() -> dict[str, Any]:
    states: dict[str, Any] = {"cpu": torch.get_rng_state(), "streams": get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["cpu"])
    get_cuda_rng_tracker().set_states(states["streams"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
