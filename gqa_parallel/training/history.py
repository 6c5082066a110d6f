"""The run's metrics on disk: ``metrics.jsonl``, one strict JSON object per logged step."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

STEP = "train/step"
FILE_NAME = "metrics.jsonl"


class History:
    """Appends rows to a run's metrics. Only rank 0 has one.

    Args:
        run_dir: the run's directory.
        resumed_step: the step of the checkpoint that the run goes on from. Later rows are dropped, since
            those steps run again; None starts a new history.
    """

    def __init__(self, run_dir: Path, resumed_step: int | None = None) -> None:
        self.path = run_dir / FILE_NAME
        kept = [] if resumed_step is None else [r for r in read_history(run_dir) if r[STEP] <= resumed_step]
        rewritten = self.path.with_suffix(".jsonl.tmp")
        with rewritten.open("w", encoding="utf-8") as file:
            file.writelines(map(_line, kept))
            file.flush()
            os.fsync(file.fileno())
        rewritten.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append one row and hand it to the operating system, so that a killed run keeps it."""
        self._file.write(_line({STEP: step, **metrics}))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_history(run_dir: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics, in the order of logging.

    Args:
        run_dir: the run's directory.

    Returns:
        One dict per row, with ``train/step``; values that were not finite are NaN. Empty where nothing
        was logged.
    """
    path = run_dir / FILE_NAME
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return list(_rows(file))


def _rows(lines: Iterable[str]) -> Iterable[dict[str, float]]:
    for line in lines:
        if line.endswith("\n"):  # else: the write that a kill cut short
            yield {key: math.nan if value is None else value for key, value in json.loads(line).items()}


def _line(row: Mapping[str, float]) -> str:
    finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
