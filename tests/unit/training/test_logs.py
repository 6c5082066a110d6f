"""The per-rank log file and the console."""

import json
import logging
import subprocess
import sys
import warnings

import pytest

from gqa_parallel.training.logs import log_path, logging_to

own = logging.getLogger("gqa_parallel.training.loop")
foreign = logging.getLogger("megatron.core.somewhere")


def entries(run_dir, rank=0):
    return [json.loads(line) for line in log_path(run_dir, rank).read_text().splitlines()]


def messages(run_dir, rank=0):
    return [entry["message"] for entry in entries(run_dir, rank)]


def test_a_record_has_its_place_time_and_fields(tmp_path):
    with logging_to(tmp_path, rank=3) as path:
        own.info("saved %s", "step 10", extra={"fields": {"step": 10}})
    assert path == tmp_path / "logs" / "rank_00003.jsonl"
    (entry,) = entries(tmp_path, rank=3)
    assert entry.pop("time").endswith("+00:00")
    assert entry == {
        "level": "INFO",
        "rank": 3,
        "logger": "gqa_parallel.training.loop",
        "message": "saved step 10",
        "fields": {"step": 10},
    }


def test_the_console_shows_our_records_and_foreign_warnings(tmp_path, capsys):
    with warnings.catch_warnings(), logging_to(tmp_path, rank=0):
        warnings.simplefilter("always")
        own.info("ours")
        own.debug("our detail")
        foreign.info("foreign detail")
        foreign.warning("foreign warning")
        warnings.warn("for developers", stacklevel=1)
    out, err = capsys.readouterr()
    assert out == ""
    shown = [line.split(maxsplit=1)[1] for line in err.splitlines()]
    assert shown == ["INFO ours", "WARNING foreign warning"]
    assert messages(tmp_path)[:3] == ["ours", "foreign detail", "foreign warning"]
    assert "UserWarning: for developers" in messages(tmp_path)[3]


def test_detail_that_a_logger_turns_on_by_itself_stays_out(tmp_path, capsys):
    with logging_to(tmp_path, rank=0):
        logging.getLogger("wandb").setLevel(logging.DEBUG)
        logging.getLogger("wandb").debug("detail")
    assert messages(tmp_path) == []


def test_other_ranks_are_silent(tmp_path, capsys):
    with logging_to(tmp_path, rank=1):
        own.warning("ours")
    assert capsys.readouterr() == ("", "")
    assert messages(tmp_path, rank=1) == ["ours"]


def test_the_level_is_that_of_our_records(tmp_path, capsys):
    with logging_to(tmp_path, rank=0, level="DEBUG"):
        own.debug("our detail")
        foreign.debug("foreign detail")
    assert messages(tmp_path) == ["our detail"]


def test_loggers_that_print_for_themselves_are_quieted(tmp_path, capsys):
    deepspeed = logging.getLogger("DeepSpeed")
    deepspeed.propagate = False
    printing = logging.StreamHandler(sys.stdout)
    deepspeed.addHandler(printing)
    try:
        with logging_to(tmp_path, rank=0):
            deepspeed.info("chatter")
            deepspeed.warning("trouble")
        assert printing in deepspeed.handlers
    finally:
        deepspeed.removeHandler(printing)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("WARNING trouble\n")
    assert "chatter" not in err
    assert messages(tmp_path) == ["chatter", "trouble"]


def test_an_exception_goes_on_and_leaves_its_traceback(tmp_path, capsys):
    with pytest.raises(ZeroDivisionError), logging_to(tmp_path, rank=0):
        1 / 0  # noqa: B018
    (entry,) = entries(tmp_path)
    assert (entry["level"], entry["message"]) == ("CRITICAL", "uncaught ZeroDivisionError: division by zero")
    assert "test_logs.py" in entry["traceback"]
    assert capsys.readouterr().err == ""  # Python itself prints it


def test_a_regular_exit_is_no_error(tmp_path):
    with pytest.raises(SystemExit), logging_to(tmp_path, rank=0):
        sys.exit(0)
    assert entries(tmp_path) == []


def test_afterwards_logging_is_as_before(tmp_path):
    root = logging.getLogger()
    before = (root.level, list(root.handlers), own.level)
    with logging_to(tmp_path, rank=0):
        pass
    assert (root.level, list(root.handlers), own.level) == before


def test_a_resumed_run_appends(tmp_path):
    for message in ("first", "second"):
        with logging_to(tmp_path, rank=0):
            own.info(message)
    assert messages(tmp_path) == ["first", "second"]


def test_a_killed_process_keeps_its_records(tmp_path):
    program = f"""
import logging, os, pathlib, signal
from gqa_parallel.training.logs import logging_to
with logging_to(pathlib.Path({str(tmp_path)!r}), rank=0):
    logging.getLogger("gqa_parallel").info("last words")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], stderr=subprocess.DEVNULL).returncode == -9
    assert messages(tmp_path) == ["last words"]
