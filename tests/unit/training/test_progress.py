"""The status line, the bar and the summary, as text."""

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from gqa_parallel.training.metrics import bits_per_byte
from gqa_parallel.training.progress import (
    ProgressDisplay,
    RunSummary,
    duration,
    print_summary,
    si,
    status_line,
)

ROW = {
    "train/loss": 2.34567,
    "train/bits_per_byte": 3.38409,
    "train/lr": 3e-4,
    "train/grad_norm": 1.2345,
    "perf/tokens_per_s": 12345.6,
    "perf/tflops": 1.234,
    "mem/peak_gib": 3.21,
}


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def piped():
    return Console(file=io.StringIO(), width=80)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.5"), (12, "12"), (999.4, "999"), (999.6, "1k"), (12345, "12.3k"), (999_600, "1M"), (2e9, "2G")],
)
def test_unit_prefixes(value, text):
    assert si(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5, "0:05"), (59.6, "1:00"), (3723, "1:02:03"), (90061, "1d 1:01:01"), (math.nan, "?")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_line_reads_from_result_to_cost():
    assert status_line(ROW, eta_s=190, head="120/1000") == (
        "120/1000  loss 2.346  bpb 3.384  lr 3.0e-04  |g| 1.23   12.3k tok/s  1.23T FLOP/s  3.2 GiB  eta 3:10"
    )


def test_lines_of_one_run_stand_in_columns():
    rows = [
        {**ROW, "train/grad_norm": 2.0, "perf/tokens_per_s": 288.0, "perf/tflops": 5.7e-5},
        {**ROW, "train/grad_norm": 0.123, "perf/tokens_per_s": 999_700.0, "perf/tflops": 412.0},
    ]
    first, second = (status_line(row, eta_s=190, head="120/1000") for row in rows)
    assert len(first) == len(second)
    for word in ("lr", "|g|", "tok/s", "FLOP/s", "GiB", "eta"):
        assert first.index(word) == second.index(word), word


def test_a_wide_line_loses_its_least_parts_and_keeps_its_best():
    row = {**ROW, "train/grad_norm": 123.0, "perf/mfu": 0.41, "mem/peak_gib": 71.2, "perf/tflops": 412.0}
    line = status_line(row, eta_s=100_000, head="100000/1000000")
    assert len(line) <= 100
    assert line.startswith("100000/1000000  loss 2.346  bpb 3.384  ")
    assert "41% MFU" in line
    assert "GiB" not in line


def test_perplexity_where_tokens_are_no_bytes():
    assert status_line({"train/loss": 10.0, "train/perplexity": 22026.47}) == "loss 10.000  ppl 2.203e+04"


def test_piped_lines_are_at_most_one_in_five_seconds_with_first_and_last():
    console, clock = piped(), Clock()
    with ProgressDisplay(total_steps=20, console=console, clock=clock) as display:
        for step in range(1, 21):
            display.update(step, {"train/loss": float(step)})
            clock.now += 1.0
    assert console.file.getvalue().splitlines() == [
        " 1/20  loss 1.000",
        " 6/20  loss 6.000",
        "11/20  loss 11.000",
        "16/20  loss 16.000",
        "20/20  loss 20.000",
    ]


def test_validation_is_always_shown():
    console = piped()
    with ProgressDisplay(total_steps=9, console=console, clock=Clock()) as display:
        display.update(1, {"train/loss": 3.0})
        display.update(2, {"train/loss": 2.0})
        display.update(2, {"val/loss": 2.5, "val/bits_per_byte": 3.6067})
    assert console.file.getvalue().splitlines()[1] == "2/9  val loss 2.5000  val bpb 3.6067"


def test_a_run_that_stops_early_still_shows_its_last_step():
    console = piped()
    with ProgressDisplay(total_steps=9, console=console, clock=Clock()) as display:
        display.update(1, {"train/loss": 3.0})
        display.update(2, {"train/loss": 2.0})
    assert console.file.getvalue().splitlines()[-1] == "2/9  loss 2.000"


def test_a_terminal_gets_a_bar_above_one_status_line():
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    with ProgressDisplay(total_steps=10, console=console) as display:
        display.update(5, ROW, eta_s=190)
        display.update(5, {"val/loss": 2.5})
    text = console.file.getvalue()
    assert "5/10" in text
    assert "50%" in text
    assert "eta 3:10" in text
    assert "5/10  val loss 2.5000" in text


def summary(**changes):
    values = {
        "steps": 1000,
        "tokens": 8_192_000,
        "seconds": 3723.0,
        "train_loss": 1.25,
        "best_val_loss": 1.3,
        "last_val_loss": 1.31,
        "readable": bits_per_byte,
        "readable_name": "bits per byte",
        "tokens_per_s": 2200.0,
        "peak_memory_gib": 3.214,
        "files": {"metrics": Path("/runs") / ("long-" * 25) / "metrics.jsonl"},
    }
    return RunSummary(**(values | changes))


def printed(summary):
    console = piped()
    print_summary(summary, console)
    return console.file.getvalue()


def test_the_summary_fits_100_columns_when_piped():
    text = printed(summary())
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text
    for part in (
        "8,192,000",
        "1:02:03",
        "1.2500  (bits per byte 1.8034)",
        "1.3000  (bits per byte 1.8755)",
        "2.2k",
        "3.21 GiB per rank",
    ):
        assert part in text


def test_what_was_not_measured_is_said():
    assert "not measured" in printed(summary(best_val_loss=None))
