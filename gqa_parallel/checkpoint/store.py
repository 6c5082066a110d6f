"""The checkpoints of a run in their folder: complete or invisible, found newest first, thinned out.

``step-00000100/`` is a complete checkpoint; while it is written its name ends in ``.part``. ``latest`` names the
newest one and changes last. Everything here is for one process, rank 0.
"""

import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gqa_parallel.checkpoint.native import (
    MANIFEST,
    DamagedCheckpoint,
    NativeCheckpoint,
    StoredFile,
    flush_folder,
    write_manifest,
    write_text,
)
from gqa_parallel.errors import UserError

LATEST = "latest"
_STEP = re.compile(r"step-(\d{8,})")
_UNFINISHED = re.compile(r"step-\d{8,}\.(part|removed)")

logger = logging.getLogger(__name__)


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def complete(checkpoints: Path) -> dict[int, Path]:
    """The complete checkpoints by step, ascending."""
    if not checkpoints.is_dir():
        return {}
    found = {int(match[1]): path for path in checkpoints.iterdir() if (match := _STEP.fullmatch(path.name))}
    return {step: found[step] for step in sorted(found) if found[step].is_dir()}


def candidates(checkpoints: Path) -> list[Path]:
    """Complete checkpoints to go on from, the newest first.

    That is the one that ``latest`` names, then those of earlier steps: later ones belong to a past that the run has
    left by resuming from before them. Where ``latest`` names none, all of them, with a warning.
    """
    found = complete(checkpoints)
    pointer = checkpoints / LATEST
    named = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else None
    match = _STEP.fullmatch(named or "")
    newest_first = [found[step] for step in reversed(found)]
    if match and int(match[1]) in found:
        return [path for path in newest_first if int(_STEP.fullmatch(path.name)[1]) <= int(match[1])]
    if found:
        logger.warning(
            "%s (%s) does not name a checkpoint beside it: taking the newest complete one",
            pointer,
            "missing" if named is None else repr(named),
        )
    return newest_first


def begin(checkpoints: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of a step into, which nobody takes for a checkpoint.

    What earlier processes left unfinished is removed.

    Raises:
        OSError: it cannot be made.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    for path in checkpoints.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path)
    part = step_folder(checkpoints, step).with_suffix(".part")
    part.mkdir()
    return part


def commit(part: Path, description: Mapping[str, Any], files: Iterable[StoredFile]) -> Path:
    """Make a checkpoint whose files are all written visible, then the newest.

    Args:
        part: from ``begin``.
        description, files: see ``write_manifest``.
    Returns:
        Its folder.
    Raises:
        OSError: the disk refuses; older checkpoints stay as they are.
    """
    folder = part.with_suffix("")
    write_manifest(part, description, files)
    if folder.exists():  # of a past that the run has left
        remove(folder)
    part.rename(folder)
    flush_folder(folder.parent)
    write_text(folder.parent / LATEST, folder.name + "\n")
    return folder


def abandon(part: Path) -> None:
    """Give up a checkpoint that could not be written."""
    shutil.rmtree(part, ignore_errors=True)


def remove(folder: Path) -> None:
    """Delete a checkpoint; a process killed meanwhile leaves nothing that looks like one."""
    removed = folder.with_suffix(".removed")
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed)


def thin_out(
    checkpoints: Path, newest: int, *, keep_last: int | None, keep_every: int | None, keep_best: bool
) -> list[Path]:
    """Delete the checkpoints that nothing keeps.

    Args:
        checkpoints: their folder.
        newest: step of the newest; those of later steps are left alone.
        keep_last: how many of the newest stay; None: all.
        keep_every: those whose step is a multiple of it stay; None: none for this reason.
        keep_best: the one with the lowest ``val_loss`` of its description stays.
    Returns:
        The folders that are gone.
    """
    found = {step: path for step, path in complete(checkpoints).items() if step <= newest}
    if keep_last is None:
        return []
    kept = {newest, *list(found)[-keep_last:]}
    if keep_every is not None:
        kept |= {step for step in found if step % keep_every == 0}
    if keep_best:
        losses = {step: loss for step, path in found.items() if (loss := _val_loss(path)) is not None}
        kept |= {min(losses, key=losses.__getitem__)} if losses else set()
    gone = [path for step, path in found.items() if step not in kept]
    for path in gone:
        remove(path)
    return gone


def _val_loss(folder: Path) -> float | None:
    try:
        return NativeCheckpoint(folder).description.get("val_loss")
    except DamagedCheckpoint:
        return None


def locate(resume: str, run_dir: Path) -> list[Path]:
    """The checkpoint folders that ``resume`` can mean, the best first.

    Args:
        resume: ``auto``: those of ``run_dir``, if there are any; ``none``: start anew; else a checkpoint folder, a run
            directory, or its ``checkpoints``.
        run_dir: of this run.
    Raises:
        UserError: the folder holds no complete checkpoint.
    """
    if resume == "none":
        return []
    if resume == "auto":
        return candidates(run_dir / "checkpoints")
    given = Path(resume).expanduser().absolute()
    if (given / MANIFEST).is_file() or _STEP.fullmatch(given.name):
        return [given]
    found = candidates(given) or candidates(given / "checkpoints")
    if not found:
        raise UserError(
            f"resume ({resume}) must be a checkpoint folder or a run directory with one: it holds neither "
            f"{MANIFEST} nor a complete checkpoint. Use resume=auto to start anew where there is none."
        )
    return found[:1]
