"""The loss curve as a picture, for those who have no tracker at hand."""

import itertools
import math
from pathlib import Path

from gqa_parallel.training.history import STEP, read_history
from gqa_parallel.training.metrics import bits_per_byte

TRAIN, VALIDATION, LEARNING_RATE, GRADIENT_NORM = "#2563eb", "#dc2626", "#0f766e", "#8b93a1"
SMOOTHING_FRACTION = 0.05  # of the curve's points


def plot_loss(run_dir: Path) -> Path | None:
    """Draw a run's training and validation loss, learning rate and gradient norm as ``run_dir/loss.png``.

    Args:
        run_dir: the run's directory, with ``metrics.jsonl``.

    Returns:
        The picture; None where no training loss was logged. Byte-level runs are drawn in bits per byte,
        others in nats per token.
    """
    rows = read_history(run_dir)
    steps, losses = _series(rows, "train/loss")
    if not steps:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    byte_level = any("train/bits_per_byte" in row for row in rows)
    scale = bits_per_byte if byte_level else float  # float: as it is
    losses = [scale(loss) for loss in losses]
    val_steps, val_losses = _series(rows, "val/loss")
    val_losses = [scale(loss) for loss in val_losses]

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))

    if len(losses) >= 20:
        top.plot(steps, losses, color=TRAIN, alpha=0.3, linewidth=0.8)
        top.plot(steps, _smoothed(losses), color=TRAIN, linewidth=1.8, label="train (smoothed)")
    else:
        top.plot(steps, losses, color=TRAIN, linewidth=1.8, marker=".", label="train")
    if val_steps:
        label = f"validation (best {min(val_losses):.3f})"
        top.plot(val_steps, val_losses, "o-", color=VALIDATION, linewidth=1, markersize=4, label=label)
    top.set_ylabel("bits per byte" if byte_level else "loss (nats per token)")
    top.set_title(run_dir.name, loc="left", fontsize=11)
    top.legend(frameon=False)

    for name, axis, color, label in (
        ("train/grad_norm", bottom, GRADIENT_NORM, "gradient norm"),
        ("train/lr", bottom.twinx(), LEARNING_RATE, "learning rate"),
    ):
        xs, ys = _series(rows, name)
        axis.set_ylabel(label, color=color)
        axis.spines["top"].set_visible(False)
        if not xs:  # stage 0 without clipping has no gradient norm
            axis.set_yticks([])
            continue
        axis.plot(xs, ys, color=color, linewidth=0.9, marker="." if len(xs) == 1 else None)
        axis.set_ylim(bottom=0)
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
    bottom.set_xlabel("step")
    top.spines[["top", "right"]].set_visible(False)
    top.grid(alpha=0.25)
    bottom.grid(alpha=0.25)

    path = run_dir / "loss.png"
    figure.savefig(path, dpi=150)
    return path


def _series(rows: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Steps and finite values of a metric."""
    pairs = [(row[STEP], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _smoothed(values: list[float]) -> list[float]:
    """Centred moving average.

    At the start, where losses fall steeply, the window shrinks on both sides; at the end on the right alone, so
    that the last points are no noisier than the others.
    """
    half = max(1, round(len(values) * SMOOTHING_FRACTION / 2))
    sums = list(itertools.accumulate(values, initial=0.0))
    result = []
    for index in range(len(values)):
        start = index - min(half, index)
        stop = min(2 * index - start + 1, len(values))
        result.append((sums[stop] - sums[start]) / (stop - start))
    return result
