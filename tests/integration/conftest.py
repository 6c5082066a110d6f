"""One training run that several tests look at, so that they share its start-up."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

import gqa_parallel.launch
from gqa_parallel.training.history import read_history
from tests.integration.programs import Finished, started

TEMPLATES = Path(gqa_parallel.launch.__file__).parent / "templates"
STEPS = 6


@dataclass(frozen=True)
class Run:
    """A finished run: ``first_step_s`` from the start of the program to the first logged step."""

    folder: Path
    command: Finished
    first_step_s: float

    def checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step:08d}"


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> list[str]:
    """Overrides of a run that takes no time. Six steps, however many are done: it decides the learning rates."""
    cache = tmp_path_factory.mktemp("cache")
    return [
        "model=debug",
        f"train.steps={STEPS}",
        "train.seq_len=64",
        "train.global_batch_size=4",
        "train.eval_batches=1",
        "train.eval_interval=3",
        "checkpoint.interval=3",
        f"data.cache_dir={cache}",
    ]


@pytest.fixture(scope="session")
def trained(small, tmp_path_factory) -> Run:
    """TP = 2 on two ranks, from start to end, launched by the template for one machine."""
    folder = tmp_path_factory.mktemp("trained")
    run_dir = folder / "run"
    command = ["bash", str(TEMPLATES / "single_node.sh"), *small, "parallel.tp=2", f"run_dir={run_dir}"]
    begin = time.monotonic()
    with started(command, folder, {"NPROC_PER_NODE": "2"}) as program:
        program.wait_until(lambda: bool(read_history(run_dir)), "the first step")
        first_step_s = time.monotonic() - begin
        return Run(run_dir, program.wait(), first_step_s)


def wandb_run_id(checkpoint: Path) -> str:
    return json.loads((checkpoint / "checkpoint.json").read_text())["wandb_run_id"]
