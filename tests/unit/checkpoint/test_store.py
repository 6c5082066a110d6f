"""Which checkpoints of a folder are found, and which are deleted."""

import pytest
import torch

from gqa_parallel.checkpoint import store
from gqa_parallel.checkpoint.native import Part, write_file
from gqa_parallel.errors import UserError


def save(checkpoints, step: int, val_loss: float | None = None):
    part = store.begin(checkpoints, step)
    file = write_file(part / "a.safetensors", [Part("w", (3,), 0, 0, torch.full((3,), float(step)))])
    return store.commit(part, {"step": step, "val_loss": val_loss}, [file])


@pytest.fixture
def checkpoints(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    for step in (2, 4, 6):
        save(folder, step)
    return folder


def steps(folders) -> list[int]:
    return [int(folder.name[5:]) for folder in folders]


def test_newest_first(checkpoints):
    assert (checkpoints / "latest").read_text() == "step-00000006\n"
    assert steps(store.candidates(checkpoints)) == [6, 4, 2]


def test_what_is_unfinished_is_no_checkpoint_and_goes_with_the_next(checkpoints):
    store.begin(checkpoints, 8)
    assert steps(store.candidates(checkpoints)) == [6, 4, 2]
    store.begin(checkpoints, 10)
    assert not (checkpoints / "step-00000008.part").exists()


def test_a_run_that_went_back_goes_on_from_there(checkpoints):
    """Resumed from step 2, saved at 3; then 6 is of a past that it has left."""
    save(checkpoints, 3)
    assert steps(store.candidates(checkpoints)) == [3, 2]
    save(checkpoints, 6)
    assert steps(store.candidates(checkpoints)) == [6, 4, 3, 2]


@pytest.mark.parametrize("text", ["", "step-00000008\n", "../run/checkpoints/step-00000002\n", "\0\n", None], ids=repr)
def test_a_pointer_to_nothing(checkpoints, caplog, text):
    pointer = checkpoints / "latest"
    pointer.unlink() if text is None else pointer.write_text(text)
    assert steps(store.candidates(checkpoints)) == [6, 4, 2]
    assert f"{pointer} (" in caplog.text and "does not name a checkpoint beside it" in caplog.text


def test_what_resume_can_mean(checkpoints, tmp_path):
    run_dir = checkpoints.parent
    assert store.locate("none", run_dir) == []
    assert store.locate("auto", tmp_path / "new") == []
    assert steps(store.locate("auto", run_dir)) == [6, 4, 2]
    for given in (run_dir, checkpoints):
        assert steps(store.locate(str(given), tmp_path)) == [6]
    assert steps(store.locate(str(checkpoints / "step-00000002"), tmp_path)) == [2]
    with pytest.raises(UserError, match=r"resume \(.*\) must be a checkpoint folder or a run directory with one"):
        store.locate(str(tmp_path), run_dir)


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ({"keep_last": None}, [1, 2, 3, 4, 5, 6]),
        ({"keep_last": 2}, [5, 6]),
        ({"keep_last": 9}, [1, 2, 3, 4, 5, 6]),
        ({"keep_last": 1, "keep_every": 2}, [2, 4, 6]),
        ({"keep_last": 1, "keep_best": True}, [3, 6]),
        ({"keep_last": 1, "keep_every": 5, "keep_best": True}, [3, 5, 6]),
    ],
    ids=str,
)
def test_retention(tmp_path, keep, left):
    for step, loss in enumerate([3.0, None, 1.0, 2.0, 1.5, 4.0], start=1):
        save(tmp_path, step, loss)
    gone = store.thin_out(tmp_path, 6, **{"keep_every": None, "keep_best": False, **keep})
    assert list(store.complete(tmp_path)) == left
    assert steps(gone) == [step for step in range(1, 7) if step not in left]
    assert {path.name for path in tmp_path.iterdir()} == {"latest", *(f"step-{step:08d}" for step in left)}


def test_retention_leaves_later_steps_alone(checkpoints):
    save(checkpoints, 3)
    store.thin_out(checkpoints, 3, keep_last=1, keep_every=None, keep_best=False)
    assert list(store.complete(checkpoints)) == [3, 4, 6]
