"""What rank 0 shows on the console while a run trains, and the table at its end."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

WIDTH = 100  # columns

# Metric: how it reads, in the order of the line; as wide at every step, so that lines stand in columns.
# Where a line is too long, LEAST_FIRST says what is left out.
READABLE: dict[str, Callable[[float], str]] = {
    "train/loss": lambda x: f"loss {x:.3f}",
    "train/bits_per_byte": lambda x: f"bpb {x:.3f}",
    "train/perplexity": lambda x: f"ppl {x:.4g}",
    "val/loss": lambda x: f"val loss {x:.4f}",
    "val/bits_per_byte": lambda x: f"val bpb {x:.4f}",
    "val/perplexity": lambda x: f"val ppl {x:.4g}",
    "train/lr": lambda x: f"lr {x:.1e}",
    "train/grad_norm": lambda x: f"|g| {x:<5.3g}",
    "perf/tokens_per_s": lambda x: f"{si(x):>5} tok/s",
    "perf/tflops": lambda x: f"{si(x * 1e12):>5} FLOP/s",
    "perf/mfu": lambda x: f"{x:>3.0%} MFU",
    "mem/peak_gib": lambda x: f"{x:.1f} GiB",
}
LEAST_FIRST = ("perf/tflops", "mem/peak_gib", "train/lr", "train/grad_norm")


def si(value: float) -> str:
    """Three digits and a unit prefix: 12345 is ``12.3k``."""
    if not math.isfinite(value):
        return str(value)
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * factor:
            return f"{value / factor:.3g}{prefix}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """``m:ss``, ``h:mm:ss`` or, from a day on, ``1d h:mm:ss``; ``?`` where unknown."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour}:{minute:02d}:{second:02d}"
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"


def status_line(metrics: Mapping[str, float], eta_s: float = math.nan, head: str = "", width: int = WIDTH) -> str:
    """The metrics as one line of at most ``width`` columns.

    Args:
        metrics: values by metric name; names that have no readable form are passed over.
        eta_s: seconds left; NaN leaves it out.
        head: what the line begins with.
    """
    parts = {name: text(metrics[name]) for name, text in READABLE.items() if name in metrics}
    tail = [f"eta {duration(eta_s)}"] if math.isfinite(eta_s) else []

    def joined() -> str:
        return "  ".join(filter(None, [head, *parts.values(), *tail])).rstrip()

    for name in LEAST_FIRST:
        if len(joined()) <= width:
            break
        parts.pop(name, None)
    return joined()[:width]


class ProgressDisplay:
    """A bar on a terminal; elsewhere a line per update, but at most one in ``min_interval_s``.

    The first and the last step, and rows with validation results, are always shown. Use as a context manager.

    Args:
        total_steps: where the run ends.
        start_step: where it begins, the resumed step.
        console: where to write; None is stderr.
        min_interval_s: seconds between lines where there is no terminal.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        console: Console | None = None,
        min_interval_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._console = console or Console(stderr=True)
        self._min_interval_s = min_interval_s
        self._clock = clock
        self._last_line_at = -math.inf
        self._pending: str | None = None
        self._bar = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=self._console,
            expand=True,
        )
        self._task = self._bar.add_task("train", total=total_steps, completed=start_step)
        self._live: Live | None = None

    def __enter__(self) -> "ProgressDisplay":
        if self._console.is_terminal:
            self._live = Live(Group(self._bar, Text("")), console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()
        elif self._pending is not None:
            self._print(self._pending)

    def update(self, step: int, metrics: Mapping[str, float], eta_s: float = math.nan) -> None:
        """Show the state after ``step``.

        Args:
            step: optimizer steps done.
            metrics: values by metric name.
            eta_s: seconds left; NaN leaves it out.
        """
        digits = len(str(self._total_steps))
        head = f"{step:>{digits}}/{self._total_steps}"
        is_validation = any(name.startswith("val/") for name in metrics)
        if self._live is not None:
            self._bar.update(self._task, completed=step)
            if is_validation:
                self._print(status_line(metrics, head=head))
            else:
                line = status_line(metrics, eta_s, width=min(WIDTH, self._console.width))
                self._live.update(Group(self._bar, Text(line, no_wrap=True)))
            return
        line = status_line(metrics, eta_s, head=head)
        due = self._clock() - self._last_line_at >= self._min_interval_s
        if is_validation or step >= self._total_steps or due:
            self._print(line)
            self._pending = None
            if not is_validation:
                self._last_line_at = self._clock()
        else:
            self._pending = line

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class RunSummary:
    """A finished run. Values that a run did not measure are None.

    Args:
        steps: optimizer steps done in all, resumed ones included.
        tokens: tokens trained on in all.
        seconds: wall-clock time of this launch.
        train_loss: of the last step, nats per token.
        best_val_loss: lowest validation loss, nats per token.
        last_val_loss: validation loss at the end, nats per token.
        readable: turns a loss into bits per byte or perplexity, e.g. ``metrics.bits_per_byte``.
        readable_name: what ``readable`` gives.
        tokens_per_s: mean of this launch, all devices; NaN where it had no step to do.
        peak_memory_gib: of one rank, GiB.
        files: what a reader looks for, by name: checkpoint, metrics, plot, W&B run.
    """

    steps: int
    tokens: int
    seconds: float
    train_loss: float | None
    best_val_loss: float | None
    last_val_loss: float | None
    readable: Callable[[float], float]
    readable_name: str
    tokens_per_s: float
    peak_memory_gib: float
    files: Mapping[str, Path | str]


def summary_table(summary: RunSummary) -> Table:
    """The run's results, two columns, for ``rich`` to print; long paths fold."""

    def loss(value: float | None) -> str:
        if value is None:
            return "not measured"
        return f"{value:.4f}  ({summary.readable_name} {summary.readable(value):.5g})"

    table = Table(title="Run summary", show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in {
        "steps": f"{summary.steps:,}",
        "tokens": f"{summary.tokens:,}",
        "time": duration(summary.seconds),
        "final train loss": loss(summary.train_loss),
        "best validation loss": loss(summary.best_val_loss),
        "last validation loss": loss(summary.last_val_loss),
        "tokens/s (mean)": si(summary.tokens_per_s) if math.isfinite(summary.tokens_per_s) else "not measured",
        "peak memory": f"{summary.peak_memory_gib:.2f} GiB per rank",
    }.items():
        table.add_row(name, Text(value))
    table.add_section()
    for name, place in summary.files.items():
        table.add_row(name, Text(str(place)))
    return table


def print_summary(summary: RunSummary, console: Console | None = None) -> None:
    """Print the table, at most 100 columns wide; stderr where no console is given."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        console.width = WIDTH  # rich assumes 80
    console.print(summary_table(summary), width=min(WIDTH, console.width))
