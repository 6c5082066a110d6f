"""Saving checkpoints beside the training steps: a copy in memory, which a thread writes; visible once it is whole."""

import contextlib
import importlib.metadata
import logging
import platform
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from gqa_parallel.checkpoint import state, store
from gqa_parallel.checkpoint.native import Part, StoredFile, write_file
from gqa_parallel.conf.schema import CheckpointConfig
from gqa_parallel.errors import UserError
from gqa_parallel.training.build import Trainee
from gqa_parallel.training.checkpoint import Description, random_states
from gqa_parallel.training.distributed import from_rank_0

logger = logging.getLogger(__name__)


@dataclass
class _Pending:
    """A checkpoint that a thread of this rank writes its file of."""

    part: Path
    description: Description
    thread: threading.Thread | None = None
    file: StoredFile | None = None
    error: OSError | None = None

    def write(self, name: str, parts: list[Part]) -> None:
        try:
            self.file = write_file(self.part / name, parts)
        except OSError as error:
            self.error = error


class Saver:
    """Saves checkpoints of a run; every rank has one and calls it at the same steps.

    At most one checkpoint is under way. It is complete when all ranks have written their files; then, and not before,
    it gets its name and ``latest`` names it.

    Args:
        run_dir: checkpoints go into its ``checkpoints``.
        config: which old ones stay.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig) -> None:
        self._checkpoints = run_dir / "checkpoints"
        self._config = config
        self._pending: _Pending | None = None

    def begin(self, trainee: Trainee, description: Description) -> None:
        """Copy what the checkpoint holds, and start writing it.

        Raises:
            UserError: on every rank: this checkpoint or the one before cannot be written.

        Communication: that of ``state.take_parts``, and a small broadcast.
        """
        self.finish()
        part, error = None, None
        if dist.get_rank() == 0:
            try:
                part = store.begin(self._checkpoints, description.step)
            except OSError as raised:
                error = _text(raised)
        part, error = from_rank_0((part, error))
        if error:
            raise self._cannot_write(description.step, error)
        parts = [*state.take_parts(trainee.engine), *random_states()]
        pending = _Pending(part, description)
        name = f"rank-{dist.get_rank():05d}.safetensors"
        pending.thread = threading.Thread(target=pending.write, args=(name, parts), name="checkpoint", daemon=True)
        pending.thread.start()
        self._pending = pending

    def written(self, device: torch.device) -> torch.Tensor:
        """1 if this rank has written its file of the checkpoint under way, or failed to; else 0."""
        return torch.tensor(float(self._pending is not None and not self._pending.thread.is_alive()), device=device)

    def finish(self) -> None:
        """Make the checkpoint under way visible, if there is one, and delete those that nothing keeps.

        It waits for this rank's file; call it when ``written`` is 1 on every rank, or where waiting is wanted.

        Raises:
            UserError: on every rank: it cannot be written. Older checkpoints stay.

        Communication: small objects to rank 0 and back.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        pending.thread.join()
        mine = pending.file if pending.error is None else f"rank {dist.get_rank()}: {_text(pending.error)}"
        everyone = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(mine, everyone)
        error = from_rank_0(self._commit(pending, everyone) if dist.get_rank() == 0 else None)
        if error:
            raise self._cannot_write(pending.description.step, error)
        logger.info("saved %s", store.step_folder(self._checkpoints, pending.description.step))

    def _commit(self, pending: _Pending, files: list[StoredFile | str]) -> str | None:
        """What is wrong, if anything."""
        problem = next((file for file in files if isinstance(file, str)), None)
        if problem is None:
            try:
                store.commit(pending.part, asdict(pending.description), files)
            except OSError as error:
                problem = _text(error)
        if problem is not None:
            store.abandon(pending.part)
            return problem
        try:
            gone = store.thin_out(
                self._checkpoints,
                pending.description.step,
                keep_last=self._config.keep_last,
                keep_every=self._config.keep_every,
                keep_best=self._config.keep_best,
            )
        except OSError as error:  # what is too much harms nobody
            logger.warning("old checkpoints were not deleted: %s", error)
        else:
            for folder in gone:
                logger.info("deleted %s", folder)
        return None

    def _cannot_write(self, step: int, problem: str) -> UserError:
        return UserError(
            f"the checkpoint {store.step_folder(self._checkpoints, step)} must be written: {problem}. "
            "The older ones are as they were: make room or permit writing, and start the same command again."
        )


def _text(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def library_versions() -> dict[str, str]:
    """Versions that a checkpoint records."""
    versions = {"python": platform.python_version()}
    for name in ("gqa_parallel", "torch", "megatron-core", "deepspeed"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
