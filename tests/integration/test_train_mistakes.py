"""What a user can get wrong about ``gqa-train``: one message, no traceback of ours, and an end within seconds."""

import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest

from gqa_parallel.data.index import HEADER, MAGIC
from gqa_parallel.data.prepare import prepare
from tests.integration.programs import TRAIN, Finished, finished, torchrun

END_S = 60  # of two programs at a time; a lone one takes 3 to 9 s on idle cores


@dataclass(frozen=True)
class Mistake:
    """``message``: a part of what is said. ``num_ranks``: under torchrun; None: without it."""

    overrides: list[str]
    message: str
    num_ranks: int | None = None
    environment: dict[str, str] = field(default_factory=dict)


# found while the configuration is composed and checked
CONFIGURATION = {
    "num_kv_heads": Mistake(
        ["model.num_kv_heads=3"],
        "num_heads (4) must be a multiple of num_kv_heads (3): the query heads of a group share one KV head. "
        "Use num_kv_heads 1, 2 or 4.",
    ),
    "tp above num_heads": Mistake(
        ["parallel.tp=8"],
        "tp (8) must be at most num_heads (4)",
        environment={"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0"},
    ),
    "world size": Mistake(
        ["parallel.tp=2"],
        "world_size (1) must be a multiple of parallel.tp (2) x parallel.cp (1)",
    ),
    "global batch": Mistake(
        ["train.micro_batch_size=3"],
        "train.global_batch_size (4) must be a multiple of",
    ),
    "unknown key": Mistake(["model.foo=1"], "unknown key model.foo: no part of the configuration reads it."),
    "added key": Mistake(["+train.stepz=1"], "unknown key train.stepz: no part of the configuration reads it. Did you"),
    "wrong type": Mistake(["train.steps=many"], "Value 'many' of type 'str' could not be converted to Integer"),
    "unknown preset": Mistake(["model=debig"], "Could not find 'model/debig'"),
    "sweep under torchrun": Mistake(
        ["parallel.tp=1,2", "-m"],
        "--multirun must not run inside torchrun",
        environment={"TORCHELASTIC_RUN_ID": "some"},
    ),
}


@pytest.fixture(scope="module")
def mistakes(trained, tmp_path_factory) -> dict[str, Mistake]:
    """Those about files, which need some to exist."""
    folder = tmp_path_factory.mktemp("files")
    text = folder / "text.txt"
    text.write_text("grouped-query attention " * 10)
    for name in ("short", "truncated"):
        prepare([text], folder / name, "byte", workers=1, progress=False)
    with (folder / "truncated.bin").open("r+b") as file:
        file.truncate(7)
    no_documents = np.zeros(1, np.int64).tobytes()
    (folder / "empty.idx").write_bytes(HEADER.pack(MAGIC, 1, 1, 0, 1) + no_documents)
    (folder / "empty.bin").touch()
    (folder / "a_file").touch()
    broken = folder / "broken"
    shutil.copytree(trained.folder / "checkpoints", broken)
    with (broken / trained.checkpoint(6).name / "rank-00001.safetensors").open("r+b") as file:
        file.truncate(1000)

    return CONFIGURATION | {
        "missing dataset": Mistake(
            [f"data.paths=[{folder}/missing]"],
            f"{folder}/missing.bin and {folder}/missing.idx do not exist",
        ),
        "empty dataset": Mistake([f"data.paths=[{folder}/empty]"], "must hold at least one token"),
        "truncated dataset": Mistake([f"data.paths=[{folder}/truncated]"], "the file is cut short"),
        "sequence longer than the corpus": Mistake(
            [f"data.paths=[{folder}/short]", "train.seq_len=512"],
            "train.seq_len (512) must be < tokens of the training split",
        ),
        "run_dir": Mistake([f"run_dir={folder}/a_file"], f"run_dir ({folder}/a_file) must be a writable folder"),
        "nothing to resume": Mistake([f"resume={folder}"], f"resume ({folder}) must be a checkpoint folder"),
        "other model": Mistake(
            [f"resume={trained.folder}", "model.hidden_size=96"],
            "hidden_size 48 there and 96 here",
        ),
        "other data": Mistake(
            [f"resume={trained.folder}", "train.seed=7"],
            "must be of this data: it has seed 1234 there and 7 here",
            num_ranks=2,
        ),
        "broken checkpoint": Mistake(
            [f"resume={broken}", "parallel.tp=2"],
            f"the checkpoint {broken}/step-00000006 must be whole: rank-00001.safetensors has 1,000 of",
            num_ranks=2,
        ),
    }


@pytest.fixture(scope="module")
def ends(mistakes, small, tmp_path_factory) -> dict[str, Finished]:
    """How each ended, run two at a time."""

    def run(name: str) -> Finished:
        mistake = mistakes[name]
        folder = tmp_path_factory.mktemp("mistake")
        overrides = [*small, f"run_dir={folder}/run", *mistake.overrides]
        command = torchrun(mistake.num_ranks, *overrides) if mistake.num_ranks else [sys.executable, *TRAIN, *overrides]
        return finished(command, folder, mistake.environment)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(mistakes, pool.map(run, mistakes), strict=True))


@pytest.mark.timeout(240)
def test_every_mistake_ends_with_one_message(mistakes, ends):
    failures = {name: complaint for name in mistakes if (complaint := complaint_about(mistakes[name], ends[name]))}
    assert not failures, "\n".join(f"{name}: {text}\n{ends[name].stderr}" for name, text in failures.items())


def complaint_about(mistake: Mistake, end: Finished) -> str | None:
    ours = re.findall(r'File "[^"]*(?:gqa_parallel|launch|conf)/[^"]*"', end.stderr)
    checks = {
        "took too long": end.seconds < END_S,
        "wrong exit code": end.exit_code == (1 if mistake.num_ranks else 2),  # torchrun's own is 1
        "not one error": len(re.findall("^error: ", end.stderr, re.MULTILINE)) == 1,
        "not its message, once": end.stderr.count(mistake.message) == 1,
        "our traceback": not [place for place in ours if "torch/distributed" not in place],
        "wrote to stdout": end.stdout == "",
    }
    if mistake.num_ranks:
        exit_codes = re.findall(r"exitcode +: (-?\d+)", end.stderr)
        # what torchrun reports of every rank: our exit code, or its own signal
        checks["a rank succeeded"] = len(exit_codes) == mistake.num_ranks and set(exit_codes) <= {"2", "-15"}
        checks["more than torchrun's traceback"] = end.stderr.count("Traceback (most") == 1
    else:
        checks["a traceback"] = "Traceback" not in end.stderr
    return ", ".join(name for name, holds in checks.items() if not holds) or None
