"""A folder that is built once per machine, however many processes ask for it at the same time."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from gqa_parallel.errors import UserError


def cache_folder(cache_dir: str | None) -> Path:
    """``data.cache_dir``, or ``~/.cache/gqa_parallel``."""
    return Path(cache_dir or "~/.cache/gqa_parallel").expanduser().absolute()


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Make ``folder`` with ``build``, unless it exists.

    Args:
        folder: its name tells its content, so that a finished one is never out of date.
        build: fills the empty folder that it is given; that one becomes ``folder`` when it returns.
    Returns:
        ``folder``, complete.
    Raises:
        UserError: the cache cannot be written.
    """
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        private = tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)
    except OSError as error:
        raise UserError(
            f"data.cache_dir ({folder.parent}) must be writable: indices and the default corpus are kept "
            f"there ({error.strerror}). Set data.cache_dir to a folder of yours."
        ) from error
    try:
        with _lock(folder):
            if not folder.exists():
                os.chmod(private, 0o755)
                build(Path(private))
                _move(private, folder)
    finally:
        shutil.rmtree(private, ignore_errors=True)
    return folder


def _move(private: str, folder: Path) -> None:
    try:
        os.rename(private, folder)
    except OSError:
        if not folder.exists():  # else: another machine with the same file system was faster
            raise


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Let one process build while the others wait. It saves work; the rename alone keeps the folder whole."""
    with open(folder.with_name(f".{folder.name}.lock"), "w") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
