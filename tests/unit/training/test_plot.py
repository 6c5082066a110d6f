"""The picture of the loss: drawn for long, short and partial histories, absent for none."""

import math

import pytest

from gqa_parallel.training.history import History
from gqa_parallel.training.metrics import loss_metrics
from gqa_parallel.training.plot import _smoothed, plot_loss

PNG = b"\x89PNG\r\n\x1a\n"


def logged(run_dir, steps, byte_level=True):
    history = History(run_dir)
    for step in range(1, steps + 1):
        loss = 1 + 4 * math.exp(-step / 40)
        row = {**loss_metrics("train", loss, byte_level), "train/lr": 1e-3, "train/grad_norm": 1.0}
        history.log(row, step)
        if step % 50 == 0:
            history.log(loss_metrics("val", loss, byte_level), step)
    return history


@pytest.mark.parametrize(("steps", "byte_level"), [(300, True), (5, True), (30, False)])
def test_a_history_gives_a_picture(tmp_path, steps, byte_level):
    logged(tmp_path, steps, byte_level)
    path = plot_loss(tmp_path)
    assert path == tmp_path / "loss.png"
    assert path.read_bytes().startswith(PNG)


def test_no_history_gives_none(tmp_path):
    assert plot_loss(tmp_path) is None
    History(tmp_path)
    assert plot_loss(tmp_path) is None
    assert not (tmp_path / "loss.png").exists()


def test_missing_and_infinite_values_are_left_out(tmp_path):
    history = History(tmp_path)
    history.log({"train/loss": 2.0}, 1)
    history.log({"train/loss": math.nan}, 2)
    history.log({"val/loss": math.inf}, 2)
    assert plot_loss(tmp_path).read_bytes().startswith(PNG)


def test_smoothing_keeps_a_line_straight_from_its_start():
    line = [0.5 * x for x in range(200)]
    assert _smoothed(line)[:190] == pytest.approx(line[:190])


def test_smoothing_averages_noise_away():
    noise = [(-1) ** x for x in range(200)]
    assert max(map(abs, _smoothed(noise)[20:])) < 0.2
