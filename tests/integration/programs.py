"""Starting a program as a person does, with a limit on its time: nothing that a test starts outlives it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 90.0
TRAIN = ("-m", "gqa_parallel.launch.train")


@dataclass(frozen=True)
class Finished:
    """How a program ended; ``seconds`` from its start."""

    exit_code: int
    stdout: str
    stderr: str
    seconds: float


class Program:
    """A running program, the leader of its own session. Its output goes to files, which never fill up as pipes do.

    Args:
        command: the program and its arguments.
        folder: its working directory and home; also holds its output.
        environment: added to this process's.
    """

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("stdout-*")))
        self._stdout, self._stderr = folder / f"stdout-{number}", folder / f"stderr-{number}"
        self._started = time.monotonic()
        with self._stdout.open("w") as stdout, self._stderr.open("w") as stderr:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env={**_environment(), "HOME": str(folder), **(environment or {})},
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    def descendants(self) -> list[int]:
        """Processes that it or its children started, the oldest first."""
        return _descendants(self.pid)

    def rank(self, number: int) -> int:
        """The process of a rank that torchrun started."""
        setting = f"RANK={number}".encode()
        return next(
            pid for pid in self.descendants() if setting in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        )

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = TIMEOUT_S) -> None:
        """Wait while the program runs. A program that ends or takes too long before ``condition`` fails the test."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self._process.poll() is None, f"it ended before {what}:\n{self.stderr}"
            assert time.monotonic() < deadline, f"no {what} within {timeout_s} s:\n{self.stderr}"
            time.sleep(0.02)

    def wait(self, timeout_s: float = TIMEOUT_S) -> Finished:
        """Its end. A program that takes longer fails the test."""
        try:
            exit_code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s:\n{self.stderr}") from None
        return Finished(exit_code, self._stdout.read_text(), self.stderr, time.monotonic() - self._started)

    def kill(self) -> None:
        """It and all that it started."""
        for pid in [*reversed(self.descendants()), *([self.pid] if self._process.poll() is None else [])]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def started(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> Iterator[Program]:
    """A program that runs while the context lasts, and is killed where it has not ended by then."""
    program = Program(command, folder, environment)
    try:
        yield program
    finally:
        program.kill()


def finished(
    command: list[str], folder: Path, environment: dict[str, str] | None = None, timeout_s: float = TIMEOUT_S
) -> Finished:
    """Run a program to its end."""
    with started(command, folder, environment) as program:
        return program.wait(timeout_s)


def torchrun(num_ranks: int, *overrides: str) -> list[str]:
    """The command that trains on ``num_ranks`` ranks of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    return [*launcher, *TRAIN, *overrides]


def _environment() -> dict[str, str]:
    """This process's, without what it may have from a scheduler, and with this Python's programs on the path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC_"))}
    kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    return kept


def _descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [descendant for child in map(int, children) for descendant in (child, *_descendants(child))]
