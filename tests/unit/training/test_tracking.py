"""W&B without a server, with one that works, and with ones that do not: training goes on in every case."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from gqa_parallel.conf.schema import WandbConfig, WandbMode
from gqa_parallel.training.tracking import Tracker, start_tracking
from tests.unit.training.wandb_server import StandInServer

WANDB = shutil.which("wandb", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
INIT_TIMEOUT_S = 2.0
# The process around it: imports, wandb's service, a machine that does other things too.
ALLOWANCE_S = 8.0

PROGRAM = """
import json, logging, os, signal, sys, time
from pathlib import Path
from gqa_parallel.conf.schema import WandbConfig, WandbMode
from gqa_parallel.training.tracking import start_tracking

logging.basicConfig(format="%(message)s")
job = json.loads(sys.argv[1])
config = WandbConfig(
    mode=WandbMode[job["mode"]], project="p", group="g", tags=["t"], init_timeout_s=2.0, finish_timeout_s=5.0
)
began = time.monotonic()
tracker = start_tracking(
    config,
    Path(job["run_dir"]),
    {"model": {"num_heads": 8, "num_kv_heads": 2}},
    [{"rank": 0, "query heads": "0-3", "KV heads": "0"}, {"rank": 1, "query heads": "4-7", "KV heads": "1"}],
    job.get("run_id"),
)
start_s = time.monotonic() - began
for step in job["steps"]:
    tracker.log({"train/loss": 10.0 - step}, step)
tracker.summary({"best": 1.5})
facts = {"mode": tracker.mode, "run_id": tracker.run_id, "run_folder": str(tracker.run_folder),
         "where": tracker.where, "start_s": start_s}
print(json.dumps(facts), flush=True)
if job.get("kill"):
    time.sleep(2.5)  # flushed every second
    os.kill(os.getpid(), signal.SIGKILL)
tracker.finish()
"""


@dataclass
class Outcome:
    mode: str
    run_id: str
    run_folder: str
    where: str
    start_s: float
    stderr: str


def environment(home, **variables):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return {**kept, "HOME": str(home), **variables}


def track(run_dir, mode="auto", steps=(1, 2, 3), environ=None, **job):
    """Run PROGRAM in a process of its own, with no key but what ``environ`` gives."""
    run_dir.mkdir(exist_ok=True)
    (home := run_dir.parent / "home").mkdir(exist_ok=True)
    job = {"run_dir": str(run_dir), "mode": mode, "steps": list(steps), **job}
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(job)],
        env=environment(home, **(environ or {})),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == (-9 if job.get("kill") else 0), process.stderr
    assert list(home.iterdir()) == []
    (facts,) = process.stdout.splitlines()  # wandb itself prints nothing
    return Outcome(**json.loads(facts), stderr=process.stderr)


def inspect(run_folder, *options):
    command = [WANDB, "leet", "inspect", "--json", *options, run_folder]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout


def history(run_folder):
    records = map(json.loads, inspect(run_folder).splitlines())
    items = (record["history"]["item"] for record in records if record["type"] == "history")
    return [(item["train/step"], item["train/loss"]) for item in items if "train/loss" in item]


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    return track(tmp_path_factory.mktemp("offline") / "tiny-1")


def test_without_a_key_auto_is_offline_and_silent(offline):
    assert offline.mode == "offline"
    assert offline.stderr == ""


def test_files_lie_in_the_run_directory(offline):
    folder = Path(offline.run_folder)
    assert folder.parts[-3:-1] == ("tiny-1", "wandb")
    assert (folder / f"run-{offline.run_id}.wandb").exists()
    assert offline.where == f"wandb leet inspect {folder}\nwandb sync {folder}"


def test_rows_have_the_training_step_as_their_axis(offline):
    assert history(offline.run_folder) == [(1, 9), (2, 8), (3, 7)]
    records = map(json.loads, inspect(offline.run_folder).splitlines())
    metrics = [record["metric"] for record in records if record["type"] == "metric"]
    assert [metric.get("step_metric") for metric in metrics if metric.get("glob_name") == "*"] == ["train/step"]


def test_the_run_has_config_names_summary_and_end(offline):
    run = json.loads(inspect(offline.run_folder, "--summary"))
    assert run["config"]["model"] == {"num_heads": 8, "num_kv_heads": 2}
    assert (run["project"], run["name"], run["tags"]) == ("p", "tiny-1", ["t"])
    assert run["summary"]["best"] == 1.5
    assert (run["state"], run["exit_code"]) == ("finished", 0)


def test_the_head_partition_is_a_table(offline):
    (path,) = Path(offline.run_folder, "files", "media", "table").glob("head_partition_*.table.json")
    assert json.loads(path.read_text()) == {
        "columns": ["rank", "query heads", "KV heads"],
        "data": [[0, "0-3", "0"], [1, "4-7", "1"]],
    }


def test_a_killed_run_keeps_its_rows(tmp_path):
    killed = track(tmp_path / "run", kill=True)
    assert history(killed.run_folder) == [(1, 9), (2, 8), (3, 7)]


def test_a_resumed_run_keeps_its_id_and_may_repeat_steps(offline, tmp_path):
    resumed = track(tmp_path / "run", steps=[2, 3, 4], run_id=offline.run_id)
    assert resumed.run_id == offline.run_id
    assert resumed.run_folder != offline.run_folder
    assert history(resumed.run_folder) == [(2, 8), (3, 7), (4, 6)]


def test_online_without_a_key_goes_on_offline_and_does_not_ask(tmp_path):
    outcome = track(tmp_path / "run", mode="online")
    assert outcome.mode == "offline"
    assert outcome.stderr == "no W&B key was found, tracking goes on offline: run wandb login\n"


def key_for(url):
    return {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40}


@pytest.mark.parametrize("hangs", [True, False], ids=["hangs", "refuses"])
def test_a_server_that_fails_costs_the_timeout_and_no_rows(tmp_path, hangs):
    if hangs:
        with StandInServer(hangs=True) as server:
            outcome = track(tmp_path / "run", environ=key_for(server.url))
    else:
        with socket.create_server(("127.0.0.1", 0)) as unused:
            url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        outcome = track(tmp_path / "run", environ=key_for(url))
    assert outcome.mode == "offline"
    assert outcome.stderr.startswith("W&B cannot be used online, tracking goes on offline: CommError: ")
    assert outcome.start_s < INIT_TIMEOUT_S + ALLOWANCE_S
    assert history(outcome.run_folder) == [(1, 9), (2, 8), (3, 7)]


def test_with_a_key_auto_streams_to_the_server_and_resumes_there(tmp_path):
    with StandInServer() as server:
        first = track(tmp_path / "run", environ=key_for(server.url))
        second = track(tmp_path / "run", environ=key_for(server.url), steps=[3, 4], run_id=first.run_id)
    assert (first.mode, second.mode) == ("online", "online")
    assert first.where == f"{server.url}/me/p/runs/{first.run_id}"
    assert second.run_id == first.run_id
    assert server.resumed == [first.run_id]
    assert [row["train/step"] for row in server.rows[first.run_id] if "train/loss" in row] == [1, 2, 3, 3, 4]
    assert server.configs[first.run_id]["model"] == {"value": {"num_heads": 8, "num_kv_heads": 2}}


@pytest.mark.parametrize(
    ("mode", "variable"), [(WandbMode.disabled, "online"), (WandbMode.auto, "disabled")], ids=["config", "variable"]
)
def test_disabled_tracks_nothing(tmp_path, monkeypatch, mode, variable):
    monkeypatch.setenv("WANDB_MODE", variable)
    tracker = start_tracking(WandbConfig(mode=mode), tmp_path, {}, [])
    tracker.log({"train/loss": 1.0}, 1)
    tracker.summary({"best": 1.0})
    tracker.finish()
    assert (tracker.mode, tracker.run_id, tracker.run_folder, tracker.where) == ("disabled", None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_wandb_is_said_once_and_ends_tracking_alone(caplog):
    class Settings:
        sync_dir = "/runs/tiny-1/wandb/offline-run"

    class BrokenRun:
        id, url, offline, settings = "abc", None, True, Settings

        def log(self, row):
            raise BrokenPipeError("the service is gone")

    tracker = Tracker(BrokenRun())
    for step in (1, 2):
        tracker.log({"train/loss": 1.0}, step)
    tracker.finish()
    assert [record.getMessage() for record in caplog.records] == [
        "W&B failed, tracking is off from here: BrokenPipeError: the service is gone"
    ]
    assert tracker.run_id == "abc"
