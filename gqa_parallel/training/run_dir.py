"""Where a run lives: one directory that every rank agrees on, and Hydra's record of how it was started."""

import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf

from gqa_parallel.errors import UserError

# on one node torchrun makes up a rendezvous id where none is given; it says less than the clock
_MADE_UP = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def identity(text: str) -> str:
    """The broadcast of a single process."""
    return text


def run_id(broadcast: Callable[[str], str] = identity) -> str:
    """An id that all ranks share, and that a job which the scheduler starts again keeps.

    Args:
        broadcast: returns rank 0's argument on every rank; called only where the environment has no id.

    Returns:
        The ``--rdzv-id`` that torchrun was given, else the scheduler's job id (``SLURM_JOB_ID``), else rank 0's
        clock in local time with a random suffix, as jobs of a sweep start within the same second.
    """
    rendezvous_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if rendezvous_id != "none" and not _MADE_UP.fullmatch(rendezvous_id):
        return rendezvous_id
    if job_id := os.environ.get("SLURM_JOB_ID"):
        return job_id
    return broadcast(f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")


def resolve_run_dir(
    run_dir: str | None,
    model_name: str,
    broadcast: Callable[[str], str] = identity,
    root: Path | str = "runs",
) -> Path:
    """Name and create the run's directory. Every rank calls this, since nodes may not share a file system.

    Args:
        run_dir: the user's choice; None gives ``<root>/<model_name>-<run id>``.
        model_name: the preset's name, ``model.name``.
        broadcast: returns rank 0's argument on every rank.
        root: the folder of all runs, relative to the working directory.

    Returns:
        The directory as an absolute path. It exists, and this rank can write to it.

    Raises:
        UserError: the directory cannot be created or written.
    """
    path = Path(run_dir) if run_dir is not None else Path(root) / f"{model_name}-{run_id(broadcast)}"
    path = path.expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(
            f"run_dir ({path}) must be a writable folder: {error.strerror}. "
            "Set run_dir to a folder that you can write to."
        ) from error
    return path


def write_hydra_record(run_dir: Path, config: Mapping[str, Any] | DictConfig, overrides: Sequence[str]) -> None:
    """Write ``.hydra/{config,overrides,hydra}.yaml`` as Hydra does. Rank 0 calls this.

    Args:
        run_dir: the run's directory.
        config: the resolved configuration.
        overrides: the command line's overrides, such as ``optim.lr=1e-3``.
    """
    record = {"config.yaml": OmegaConf.create(config), "overrides.yaml": ListConfig(list(overrides))}
    if HydraConfig.initialized():
        record["hydra.yaml"] = OmegaConf.create({"hydra": HydraConfig.get()})
    folder = run_dir / ".hydra"
    folder.mkdir(exist_ok=True)
    for name, content in record.items():
        (folder / name).write_text(OmegaConf.to_yaml(content), encoding="utf-8")
