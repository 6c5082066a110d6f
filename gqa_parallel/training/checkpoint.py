"""Periodic checkpoints of a run, and resuming it in the same layout.

``run_dir/checkpoints/step-00000100/`` holds what DeepSpeed stores, the random states of every rank, and
``checkpoint.json``, which says what it is a checkpoint of. ``run_dir/checkpoints/latest`` names the newest complete
one: it changes only when every rank has written its part.
"""

import json
import os
import shutil
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from gqa_parallel.errors import UserError
from gqa_parallel.training.build import Trainee
from gqa_parallel.training.distributed import from_rank_0

DESCRIPTION = "checkpoint.json"
LATEST = "latest"


@dataclass(frozen=True)
class Description:
    """What a checkpoint is of.

    Attributes:
        step: optimizer steps done.
        model: what the weights mean.
        data: what the next samples follow from.
        layout: how weights and optimizer are spread over ranks.
        wandb_run_id: the run's, if it is tracked.
        best_val_loss: lowest validation loss so far, nats per token.
    """

    step: int
    model: dict[str, Any]
    data: dict[str, Any]
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


def check_matches(folder: Path, found: Description, identity: dict[str, dict[str, Any]]) -> None:
    """
    Args:
        folder: the checkpoint's.
        found: what it is of.
        identity: ``model``, ``data`` and ``layout`` of this run.
    Raises:
        UserError: the checkpoint is of another model, data or layout; names what differs.
    """
    for what, ours in identity.items():
        theirs = getattr(found, what)
        differing = [key for key in sorted({*theirs, *ours}) if theirs.get(key) != ours.get(key)]
        if differing:
            pairs = ", ".join(f"{key} {theirs.get(key)} there and {ours.get(key)} here" for key in differing)
            way_out = {
                "model": "Use the configuration that it was trained with, or another run_dir.",
                "data": "Go on with the data that it was reading, or start anew in another run_dir.",
                "layout": "Resume with the layout that it was saved in.",
            }[what]
            raise UserError(f"the checkpoint {folder} must be of this {what}: it has {pairs}. {way_out}")


def save(run_dir: Path, trainee: Trainee, description: Description) -> Path:
    """Write a checkpoint; on every rank.

    Returns:
        The folder. Until all ranks have written theirs, ``latest`` names the one before.
    """
    checkpoints = run_dir / "checkpoints"
    folder = checkpoints / f"step-{description.step:08d}"
    part = folder.with_suffix(".part")
    if dist.get_rank() == 0:
        shutil.rmtree(part, ignore_errors=True)  # of a save that was killed
    dist.barrier()
    trainee.engine.save_checkpoint(
        str(checkpoints), tag=part.name, client_state={"schedule": trainee.schedule.state_dict()}, save_latest=False
    )
    torch.save(_random_states(), _random_states_path(part))
    dist.barrier()
    if dist.get_rank() == 0:
        _write(part / DESCRIPTION, json.dumps(asdict(description), indent=2) + "\n")
        if folder.exists():  # a run that was resumed from before it
            shutil.rmtree(folder)
        part.rename(folder)
        _write(checkpoints / LATEST, folder.name + "\n")
    dist.barrier()
    return folder


def load(folder: Path, trainee: Trainee) -> None:
    """Restore weights, optimizer, schedule and random states; on every rank.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    _check_none_cut_short(folder)
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


def _check_none_cut_short(folder: Path) -> None:
    """A rank that failed alone while loading would leave the others in the middle of a collective."""
    cut_short = from_rank_0([path.name for path in sorted(folder.glob("*.pt")) if not zipfile.is_zipfile(path)])
    if cut_short:
        raise UserError(
            f"the checkpoint {folder} must be whole: {', '.join(cut_short)} cannot be read. "
            "Write the name of another step folder into checkpoints/latest, or use resume=none."
        )


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
