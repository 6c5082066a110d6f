"""The metrics file: strict JSON lines, readable after a kill, without a resumed run's repeated steps."""

import json
import math

from gqa_parallel.training.history import History, read_history


def written(run_dir, steps):
    history = History(run_dir)
    for step in steps:
        history.log({"train/loss": 10.0 - step}, step)
    return history


def test_rows_come_back_before_the_file_is_closed(tmp_path):
    written(tmp_path, [1, 2])
    assert read_history(tmp_path) == [
        {"train/step": 1, "train/loss": 9.0},
        {"train/step": 2, "train/loss": 8.0},
    ]


def test_no_file_is_an_empty_history(tmp_path):
    assert read_history(tmp_path) == []


def test_a_resumed_run_drops_the_steps_after_its_checkpoint(tmp_path):
    written(tmp_path, range(1, 8)).close()
    resumed = History(tmp_path, resumed_step=5)
    resumed.log({"train/loss": 0.5}, 6)
    rows = read_history(tmp_path)
    assert [row["train/step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["train/loss"] == 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_run_starts_a_new_history(tmp_path):
    written(tmp_path, [0, 1]).close()
    History(tmp_path)
    assert read_history(tmp_path) == []


def test_a_line_cut_short_by_a_kill_is_passed_over_and_then_removed(tmp_path):
    written(tmp_path, [1, 2]).close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-5])
    assert [row["train/step"] for row in read_history(tmp_path)] == [1]
    History(tmp_path, resumed_step=2).log({"train/loss": 1.0}, 3)
    assert [row["train/step"] for row in read_history(tmp_path)] == [1, 3]


def test_values_that_are_not_finite_stay_strict_json(tmp_path):
    History(tmp_path).log({"train/loss": math.nan, "train/grad_norm": math.inf}, 1)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse) == {
        "train/step": 1,
        "train/loss": None,
        "train/grad_norm": None,
    }
    assert math.isnan(read_history(tmp_path)[0]["train/loss"])
