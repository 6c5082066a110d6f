"""``gqa-train`` under torchrun as a person starts, stops, kills and resumes it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gqa_parallel.training.history import read_history
from tests.integration.conftest import STEPS, TEMPLATES, wandb_run_id
from tests.integration.programs import TRAIN, finished, started, torchrun

WANDB = Path(sys.executable).with_name("wandb")
FIRST_STEP_S = 25  # the most that a start may take; 9 s on two idle cores
END_S = 10  # from a fault on one rank to the end of the run


def records(run_dir: Path) -> list[dict]:
    """All records of the one W&B run in ``run_dir``, as W&B's own reader gives them."""
    (folder,) = run_dir.glob("wandb/offline-run-*")
    done = subprocess.run(
        [str(WANDB), "leet", "inspect", "--json", str(folder)], capture_output=True, text=True, timeout=30, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def losses(run_dir: Path) -> dict[int, float]:
    return {row["train/step"]: row["train/loss"] for row in read_history(run_dir) if "train/loss" in row}


def logged_steps(run_dir: Path) -> list[int]:
    return [row["train/step"] for row in read_history(run_dir) if "train/loss" in row]


class TestARun:
    def test_succeeds_and_says_what_came_out(self, trained):
        assert trained.command.exit_code == 0, trained.command.stderr
        assert trained.command.stdout == ""
        stderr = trained.command.stderr
        assert stderr.count("Run summary") == 1
        for text in ("final train loss", "best validation loss", "tokens/s (mean)", "peak memory", str(trained.folder)):
            assert text in stderr
        for noise in ("Traceback", "Warning", "WARNING", "OMP_NUM_THREADS", "[Rank", "[rank"):
            assert noise not in stderr

    def test_starts_in_time(self, trained):
        assert trained.first_step_s < FIRST_STEP_S

    def test_leaves_its_files(self, trained):
        for name in (".hydra/config.yaml", ".hydra/overrides.yaml", ".hydra/hydra.yaml", "metrics.jsonl"):
            assert (trained.folder / name).stat().st_size, name
        assert (trained.folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert sorted(path.name for path in (trained.folder / "logs").iterdir()) == [
            "rank_00000.jsonl",
            "rank_00001.jsonl",
        ]
        assert (trained.folder / "checkpoints" / "latest").read_text() == f"step-{STEPS:08d}\n"

    def test_logs_every_step(self, trained):
        assert logged_steps(trained.folder) == list(range(1, STEPS + 1))
        rows = read_history(trained.folder)
        steps = [row for row in rows if "train/loss" in row]
        names = {"train/loss", "train/bits_per_byte", "train/lr", "train/grad_norm", "train/tokens"}
        names |= {"perf/step_s", "perf/tokens_per_s", "perf/tflops", "mem/peak_gib"}
        assert all(names <= set(row) for row in steps)
        evaluations = [row for row in rows if "val/loss" in row]
        assert [row["train/step"] for row in evaluations] == [3, 6]
        assert all(set(row) == {"train/step", "val/loss", "val/bits_per_byte"} for row in evaluations)
        # random weights: every byte as likely as any other, ln 257 nats
        assert losses(trained.folder)[1] == pytest.approx(5.55, abs=0.4)

    def test_logs_the_same_to_wandb(self, trained):
        found = records(trained.folder)
        history = [record["history"]["item"] for record in found if record["type"] == "history"]
        table_row, *rows = [{key: value for key, value in item.items() if key[0] != "_"} for item in history]
        assert table_row["head_partition.nrows"] == 2
        assert rows == read_history(trained.folder)

        (run,) = (record["run"] for record in found if record["type"] == "run")
        assert run["run_id"] == wandb_run_id(trained.checkpoint(STEPS))
        config = run["config"]["update"]
        assert config["model"]["num_kv_heads"] == 2
        assert config["parallel"]["tp"] == 2
        assert config["model"]["activation"] == "swiglu"  # not a member of an enum
        assert config["run_dir"] == str(trained.folder)

        (table,) = trained.folder.glob("wandb/offline-run-*/files/media/table/head_partition*.json")
        heads = json.loads(table.read_text())
        assert heads["columns"] == ["tp_rank", "query_heads", "kv_heads", "kv_replica_ranks"]
        assert heads["data"] == [[0, "[0, 1]", "[0]", "[0]"], [1, "[2, 3]", "[1]", "[1]"]]

        summary: dict = {}
        for record in found:
            if record["type"] == "summary":
                summary |= record["summary"]["update"]
        assert {"val/best_loss", "perf/mean_tokens_per_s"} <= set(summary)
        assert summary["train/loss"] == losses(trained.folder)[STEPS]
        (exit_record,) = (record["exit"] for record in found if record["type"] == "exit")
        assert exit_record.get("exit_code", 0) == 0


def test_a_resumed_run_repeats_the_straight_one_bit_for_bit(small, trained, tmp_path):
    run_dir = tmp_path / "branch"
    arguments = [*small, "parallel.tp=2", f"run_dir={run_dir}", f"resume={trained.checkpoint(3)}"]
    done = finished(torchrun(2, *arguments), tmp_path, {"OMP_NUM_THREADS": "1"})
    assert done.exit_code == 0, done.stderr
    assert losses(run_dir) == {step: loss for step, loss in losses(trained.folder).items() if step > 3}
    validation = [row for row in read_history(trained.folder) if "val/loss" in row]
    assert [row for row in read_history(run_dir) if "val/loss" in row] == [
        row for row in validation if row["train/step"] > 3
    ]
    # a branch is a run of its own: W&B would mix the two otherwise
    assert wandb_run_id(run_dir / "checkpoints" / f"step-{STEPS:08d}") != wandb_run_id(trained.checkpoint(STEPS))


def test_a_run_goes_on_in_another_layout_past_a_damaged_checkpoint(small, trained, tmp_path):
    """From tp = 2 to dp = 2 at ZeRO 3, from the newest checkpoint that is whole."""
    run_dir = tmp_path / "run"
    shutil.copytree(trained.folder / "checkpoints", run_dir / "checkpoints")
    newest = run_dir / "checkpoints" / trained.checkpoint(STEPS).name / "rank-00001.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    command = torchrun(2, *small, "parallel.tp=1", "zero.stage=3", "checkpoint.keep_last=1", f"run_dir={run_dir}")
    done = finished(command, tmp_path, {"OMP_NUM_THREADS": "1"})
    assert done.exit_code == 0, done.stderr
    assert "rank-00001.safetensors is not as it was written (SHA-256)" in done.stderr
    assert f"resumed from {run_dir}/checkpoints/step-00000003" in done.stderr
    assert losses(run_dir) == pytest.approx(
        {step: loss for step, loss in losses(trained.folder).items() if step > 3}, rel=1e-5
    )
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["latest", f"step-{STEPS:08d}"]


def test_a_second_run_in_the_same_directory_is_refused(small, tmp_path):
    run_dir = tmp_path / "run"
    overrides = [*small, "train.steps=10000", "train.eval_interval=0", f"run_dir={run_dir}"]
    with started(torchrun(1, *overrides), tmp_path) as first:
        first.wait_until(lambda: bool(read_history(run_dir)), "the first step")
        second = finished([sys.executable, *TRAIN, *overrides], tmp_path)
        assert second.exit_code == 2
        assert f"run_dir ({run_dir}) must belong to one run at a time: process {first.rank(0)} of" in second.stderr


def test_a_run_that_is_stopped_saves_and_goes_on_with_the_same_command(small, tmp_path):
    run_dir, steps = tmp_path / "run", 30
    command = torchrun(
        2, *small, "parallel.tp=2", f"train.steps={steps}", "train.eval_interval=0", f"run_dir={run_dir}"
    )
    with started(command, tmp_path) as program:
        program.wait_until(lambda: len(read_history(run_dir)) >= 2, "the second step")
        ranks = [program.rank(0), program.rank(1)]
        os.kill(program.pid, signal.SIGTERM)
        # some schedulers signal every process, so that the ranks hear it twice: themselves and through torchrun
        for pid in ranks:
            os.kill(pid, signal.SIGTERM)
        stopped = program.wait()
    assert stopped.exit_code != 0
    at = logged_steps(run_dir)[-1]
    assert 2 <= at < steps
    assert f"stopped by a signal after step {at}; the same command goes on from there" in stopped.stderr
    assert (run_dir / "checkpoints" / "latest").read_text() == f"step-{at:08d}\n"
    first_id = wandb_run_id(run_dir / "checkpoints" / f"step-{at:08d}")

    # a row after the checkpoint, as a run leaves it that is killed between two of them
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"train/step": at + 1, "train/loss": 0.0}) + "\n")
    resumed = finished(command, tmp_path)
    assert resumed.exit_code == 0, resumed.stderr
    assert f"resumed from {run_dir}/checkpoints/step-{at:08d}" in resumed.stderr
    assert logged_steps(run_dir) == list(range(1, steps + 1))
    assert losses(run_dir)[at + 1] > 1
    assert wandb_run_id(run_dir / "checkpoints" / f"step-{steps:08d}") == first_id


def test_a_killed_rank_ends_the_run(small, tmp_path):
    run_dir = tmp_path / "run"
    command = torchrun(2, *small, "parallel.tp=2", "train.steps=10000", "train.eval_interval=0", f"run_dir={run_dir}")
    with started(command, tmp_path) as program:
        program.wait_until(lambda: bool(read_history(run_dir)), "the first step")
        ranks = [program.rank(0), program.rank(1)]
        os.kill(ranks[1], signal.SIGKILL)
        killed = time.monotonic()
        done = program.wait()
        assert time.monotonic() - killed < END_S
        assert done.exit_code != 0
        assert "Signal 9 (SIGKILL)" in done.stderr
        assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert read_history(run_dir)


def test_two_machines_train_one_model(small, tmp_path):
    """The two agents of the template for several machines, on this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {"NNODES": "2", "NPROC_PER_NODE": "1", "RDZV_ENDPOINT": endpoint, "RUN_ID": "both"}
    command = ["bash", str(TEMPLATES / "multi_node.sh"), *small, "parallel.tp=2", "train.steps=2"]
    with started(command, tmp_path, environment) as first, started(command, tmp_path, environment) as second:
        ends = [first.wait(), second.wait()]
    assert [end.exit_code for end in ends] == [0, 0], ends[0].stderr + ends[1].stderr
    assert sum(end.stderr.count("Run summary") for end in ends) == 1
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name == "debug-both"
    assert logged_steps(run_dir) == [1, 2]
    assert len(list((run_dir / "logs").iterdir())) == 2


def stub(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


def test_slurm_saves_and_queues_again_before_the_time_limit(small, tmp_path):
    """The template with stand-ins for Slurm's commands."""
    commands, job = tmp_path / "bin", tmp_path / "job"
    commands.mkdir()
    stub(commands, "srun", f'while [[ $1 == -* ]]; do shift; done; echo $$ > {tmp_path}/task; exec "$@"')
    stub(commands, "scontrol", f'echo "$*" >> {tmp_path}/scontrol; [[ $1 != show ]] || echo 127.0.0.1')
    stub(commands, "scancel", f'[[ "$*" == "--signal=TERM 4711" ]] && kill -TERM "$(cat {tmp_path}/task)"')
    environment = {
        "PATH": os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "gqa",
        "SLURM_JOB_NODELIST": "node[1]",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
    }
    run_dir = job / "runs" / "gqa-4711"
    script = shutil.copy(TEMPLATES / "slurm.sbatch", tmp_path)  # as slurmd does
    with started(["bash", script, *small, "parallel.tp=2", "train.steps=10000"], job, environment) as program:
        program.wait_until(lambda: len(read_history(run_dir)) >= 1, "the first step")
        os.kill(program.pid, signal.SIGUSR1)
        done = program.wait()
    assert done.exit_code == 1, done.stderr
    assert (tmp_path / "scontrol").read_text().splitlines() == ["show hostnames node[1]", "requeue 4711"]
    at = logged_steps(run_dir)[-1]
    assert (run_dir / "checkpoints" / "latest").read_text() == f"step-{at:08d}\n"


@pytest.mark.parametrize("template", sorted(TEMPLATES.iterdir()), ids=lambda path: path.name)
def test_templates_are_valid_and_open_with_their_use(template):
    assert subprocess.run(["bash", "-n", str(template)], timeout=10).returncode == 0
    opening = template.read_text().splitlines()[:6]
    assert opening[0] == "#!/usr/bin/env bash"
    assert any(template.name in line for line in opening)
