"""Who is told how training goes: the screen, the metrics file and W&B, all of rank 0."""

from collections.abc import Mapping
from dataclasses import dataclass

from gqa_parallel.training.history import History
from gqa_parallel.training.progress import ProgressDisplay
from gqa_parallel.training.tracking import Tracker


@dataclass(frozen=True)
class Observers:
    """On ranks other than 0 there are none."""

    display: ProgressDisplay | None = None
    history: History | None = None
    tracker: Tracker | None = None
    wandb_run_id: str | None = None

    def log(self, metrics: Mapping[str, float], step: int, eta_s: float = float("nan")) -> None:
        """Tell all of them.

        Args:
            metrics: values by metric name.
            step: optimizer steps done.
            eta_s: seconds left; NaN: unknown.
        """
        if self.history is not None:
            self.history.log(metrics, step)
        if self.tracker is not None:
            self.tracker.log(metrics, step)
        if self.display is not None:
            self.display.update(step, metrics, eta_s)
