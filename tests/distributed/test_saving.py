"""Checkpoints are complete or invisible, and a damaged one ends in one clear error on all ranks, or in an older one."""

import json
import os
import pickle
import random
import shutil
import signal
import sys
import time

import pytest

from gqa_parallel.checkpoint import native, store
from tests.distributed.saving import ROWS, found, refused_save, save, save_for_ever

KILLS = 30


@pytest.fixture(scope="module")
def original(ranks, tmp_path_factory):
    """Steps 3 and 6, of two ranks."""
    run_dir = tmp_path_factory.mktemp("original")
    ranks(2)(save, run_dir, [3, 6])
    return run_dir


@pytest.fixture
def run_dir(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run")


class Payload:
    def __reduce__(self):
        return os.mkdir, ("a-pickle-ran",)


def flip_a_bit(folder):
    path = folder / "rank-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(folder):
    with (folder / "rank-00001.safetensors").open("r+b") as file:
        file.truncate(99)


def swap_ranks(folder):
    for source, target in (("0", "x"), ("1", "0"), ("x", "1")):
        (folder / f"rank-0000{source}.safetensors").rename(folder / f"rank-0000{target}.safetensors")


def take_from_another_step(folder):
    shutil.copy(folder.parent / "step-00000003" / "rank-00000.safetensors", folder)


def old_version(folder):
    content = json.loads((folder / "checkpoint.json").read_text())
    content["version"] = 0
    (folder / "checkpoint.json").write_text(json.dumps(content))


def other_dtype(folder):
    """The file in bf16, under a manifest that says fp32."""
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / "rank-00000.safetensors"
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in load_file(path).items()}, path)


def edit_manifest(folder):
    path = folder / "checkpoint.json"
    path.write_text(path.read_text().replace('"step": 6', '"step": 7'))


DAMAGE = {
    "truncated": (truncate, "rank-00001.safetensors has 99 of"),
    "bit-flipped": (flip_a_bit, "rank-00001.safetensors is not as it was written"),
    "missing": (lambda folder: (folder / "rank-00001.safetensors").unlink(), "rank-00001.safetensors is missing"),
    "swapped ranks": (swap_ranks, "rank-00000.safetensors is not as it was written"),
    "another step": (take_from_another_step, "rank-00000.safetensors is not as it was written"),
    "a pickle": (
        lambda folder: (folder / "rank-00000.safetensors").write_bytes(pickle.dumps(Payload())),
        "rank-00000.safetensors has",
    ),
    "wrong dtype": (other_dtype, "rank-00000.safetensors has"),
    "old version": (old_version, "checkpoint.json is of format gqa_parallel 0, not gqa_parallel 1"),
    "edited manifest": (edit_manifest, "checkpoint.json is not as it was written"),
    "empty manifest": (lambda folder: (folder / "checkpoint.json").write_bytes(b""), "checkpoint.json cannot be read"),
}


def test_undamaged(ranks, run_dir):
    assert ranks(2)(found, run_dir) == [{"step": 6, "error": None, "warnings": []}] * 2
    assert [answer["step"] for answer in ranks(2)(found, run_dir / "new")] == [None, None]
    assert [answer["step"] for answer in ranks(2)(found, run_dir, "none")] == [None, None]


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage(ranks, run_dir, kind):
    """``auto`` goes on from the older one and says why; who names the damaged one gets the error; nobody hangs."""
    damage, message = DAMAGE[kind]
    folder = run_dir / "checkpoints" / "step-00000006"
    damage(folder)
    for answer in ranks(2)(found, run_dir):
        assert answer["step"] == 3
        (warning,) = answer["warnings"]
        assert warning.startswith(f"skipped a checkpoint: the checkpoint {folder} must be whole: {message}")
    for given in (folder, run_dir):
        for answer in ranks(2)(found, run_dir, str(given)):
            assert answer["error"].startswith(f"the checkpoint {folder} must be whole: {message}")
    assert not os.path.exists("a-pickle-ran")


def test_nothing_whole_is_left(ranks, run_dir):
    """Starting anew would in the end write over them."""
    for step in (3, 6):
        truncate(run_dir / "checkpoints" / f"step-{step:08d}")
    for answer in ranks(2)(found, run_dir):
        assert answer["error"].startswith(f"the checkpoint {run_dir}/checkpoints/step-00000003 must be whole: ")


def test_an_empty_pointer(ranks, run_dir):
    (run_dir / "checkpoints" / "latest").write_bytes(b"")
    answers = ranks(2)(found, run_dir)
    assert [answer["step"] for answer in answers] == [6, 6]
    assert "latest ('') does not name a checkpoint beside it" in answers[0]["warnings"][0]


def test_another_model(ranks, run_dir):
    for answer in ranks(2)(found, run_dir, "auto", {"num_layers": 3}):
        assert "must be of this model: it has num_layers 2 there and 3 here. " in answer["error"]


@pytest.mark.parametrize("full", [True, False], ids=["no space left", "read-only folder"])
def test_what_cannot_be_written(ranks, run_dir, full):
    """An error on all ranks, though one saw it; what was there before is whole, and nothing else is there."""
    messages = ranks(2)(refused_save, run_dir, 9, full)
    problem = "rank 1: disk: No space left on device" if full else "disk: Read-only file system"
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"the checkpoint {run_dir}/checkpoints/step-00000009 must be written: {problem}. ")
    assert [answer["step"] for answer in ranks(2)(found, run_dir)] == [6, 6]
    names = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert names == {"latest", "step-00000003", "step-00000006"}


def test_retention(ranks, run_dir):
    ranks(2)(save_with_retention, run_dir)
    assert list(store.complete(run_dir / "checkpoints")) == [3, 6, 9, 10, 12]


def save_with_retention(run_dir) -> None:
    save(run_dir, [8, 9, 10, 12], keep_last=2, keep_every=3)


@pytest.mark.timeout(120)
def test_killed_at_any_moment(ranks, tmp_path):
    """SIGKILL while it saves, thirty times in one folder: what was complete stays, what was not is never found."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    moments = random.Random(seed)
    checkpoints = tmp_path / "checkpoints"
    newest, unfinished = 0, 0
    for kill in range(KILLS):
        keep_last = (None, 3)[kill % 2]
        before = set(store.complete(checkpoints))
        acknowledged = killed_while_saving(tmp_path, newest + 1, keep_last, moments.uniform(0, 0.05))
        complete = store.complete(checkpoints)
        unfinished += any(path.suffix in (".part", ".removed") for path in checkpoints.iterdir())

        # it may have ended between the pointer and telling us
        assert max(complete) in (acknowledged, acknowledged + 1)
        assert int(store.candidates(checkpoints)[0].name[5:]) >= acknowledged
        if keep_last is None:
            assert before | set(range(newest + 1, acknowledged + 1)) <= set(complete)
        else:
            assert {step for step in range(acknowledged - 1, acknowledged + 1) if step > 0} <= set(complete)
        for step, folder in complete.items():
            checkpoint = native.NativeCheckpoint(folder)
            checkpoint.verify(checkpoint.files)
            assert checkpoint.read_whole("w")[ROWS - 1, 0] == step
        newest = max(complete)
    assert unfinished > KILLS // 5, "it must have been caught in the middle"


def killed_while_saving(run_dir, first: int, keep_last: int | None, delay_s: float) -> int:
    """Kill a process ``delay_s`` after its first checkpoint. Returns the last step that it said was complete."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            save_for_ever(run_dir, first, writer, keep_last)
        finally:
            sys.stderr.flush()
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.readline()
        time.sleep(delay_s)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        lines = [said, *pipe]
    assert said, "it failed to save"
    return int(lines[-1])
