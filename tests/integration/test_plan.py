"""``gqa-plan`` as a person starts it: quick, without torch, and readable through a pipe."""

import os
import subprocess
import sys
import time

import pytest

COLUMNS = 100


def plan(*overrides: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *python, "-m", "gqa_parallel.launch.plan", *overrides],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )


def rows(output: str) -> list[list[str]]:
    return [line.split() for line in output.splitlines()]


def test_needs_no_torch_and_little_time():
    started = time.monotonic()
    result = plan("model=tiny", python=("-X", "importtime"))
    assert time.monotonic() - started < 6  # under 1 s where the machine is idle
    assert result.returncode == 0, result.stderr
    imported = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()}
    assert "gqa_parallel.partition.cost" in imported
    assert not imported & {"torch", "megatron", "deepspeed", "transformers"}


def test_uneven_heads():
    result = plan("model=qwen2.5_0.5b", "parallel.tp=4", "world_size=8")
    assert (result.returncode, result.stderr) == (0, "")
    found = rows(result.stdout)
    assert ["0", "0-3", "4", "0", "1", "0-1"] in found
    assert ["3", "11-13", "3", "1", "1", "2-3"] in found
    assert "imbalance 1.14: the fullest rank has 4 query heads, the mean is 3.5" in result.stdout
    assert "world size 8 = tp 4 x dp 2" in result.stdout
    assert ["total", "494,032,768", "126,295,936"] in found
    assert ["attention", "backward", "all-reduce", "KV", "weight", "gradient"] in [row[:6] for row in found]
    assert ["fullest", "rank", "6", "KiB", "6", "MiB", "24", "MiB", "4", "x"] in found
    assert ["micro-batches", "per", "rank", "4", "4,000"] in found
    assert ["tokens", "8,192", "8,192,000"] in found


@pytest.mark.parametrize(
    "overrides",
    [
        ("model=llama2_7b", "parallel.tp=8"),
        ("model=llama3.1_70b", "parallel.tp=32", "world_size=64", "parallel.sequence_parallel=true"),
    ],
)
def test_fits_a_pipe(overrides):
    result = plan(*overrides, "zero.stage=2")
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout  # no colour
    assert max(map(len, result.stdout.splitlines())) <= COLUMNS
    assert "…" not in result.stdout  # no cell was cut
    assert [line.split()[1] for line in result.stdout.splitlines() if line.startswith("  > ")] == ["2"]


def test_many_ranks_are_shortened():
    found = rows(plan("model=llama3.1_70b", "parallel.tp=32").stdout)
    assert ["..."] * 6 in found
    assert ["31", "62-63", "2", "7", "1", "28-31"] in found
    assert not any(row[:2] == ["20", "40-41"] for row in found)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("parallel.tp=8",), "tp (8) must be at most num_heads (4)"),
        (("world_size=3", "parallel.tp=2"), "world_size (3) must be a multiple of parallel.tp (2)"),
        (("modle=tiny",), "modle"),
        (("+modle=tiny",), "unknown key modle"),
    ],
)
def test_a_mistake_ends_with_one_message(overrides, message):
    result = plan(*overrides)
    assert result.returncode == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.count("error:") == 1
    assert "Traceback" not in result.stderr
