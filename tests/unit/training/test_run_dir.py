"""The run's directory: which id names it, that it can be written, and Hydra's record in it."""

import re

import pytest
from omegaconf import OmegaConf

from gqa_parallel.errors import UserError
from gqa_parallel.training.run_dir import resolve_run_dir, run_id, write_hydra_record


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


def refuse(text):
    raise AssertionError("the environment has an id: nothing is to be broadcast")


def test_the_id_that_torchrun_was_given_comes_first(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
    assert run_id(refuse) == "abc"


@pytest.mark.parametrize("made_up", ["none", "8a7a6347-1bda-481e-b02c-be85766c505f"])
def test_the_schedulers_job_id_comes_second(monkeypatch, made_up):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", made_up)
    assert run_id(refuse) == "4711"


def test_torchruns_default_id_is_none_at_all(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert run_id(lambda text: "rank 0's") == "rank 0's"


def test_the_clocks_ids_differ_within_a_second():
    ids = {run_id() for _ in range(5)}
    assert len(ids) > 1
    assert all(re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{4}", one) for one in ids)


def test_a_given_directory_is_taken_and_created(tmp_path):
    path = resolve_run_dir(str(tmp_path / "a" / "b"), "tiny", refuse)
    assert path == tmp_path / "a" / "b"
    assert path.is_dir()
    assert list(path.iterdir()) == []


def test_the_default_directory_names_model_and_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_run_dir(None, "tiny", lambda text: "7") == tmp_path / "runs" / "tiny-7"
    assert (tmp_path / "runs" / "tiny-7").is_dir()


def test_a_directory_that_cannot_be_written_is_the_users_mistake(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as error:
        resolve_run_dir(str(tmp_path / "file" / "run"), "tiny")
    assert str(error.value) == (
        f"run_dir ({tmp_path}/file/run) must be a writable folder: Not a directory. "
        "Set run_dir to a folder that you can write to."
    )


def test_hydras_record_holds_config_and_overrides(tmp_path):
    write_hydra_record(tmp_path, {"optim": {"lr": 1e-3}}, ["optim.lr=1e-3"])
    assert OmegaConf.load(tmp_path / ".hydra" / "config.yaml") == {"optim": {"lr": 1e-3}}
    assert OmegaConf.load(tmp_path / ".hydra" / "overrides.yaml") == ["optim.lr=1e-3"]


def test_inside_hydra_its_own_config_is_recorded_too(tmp_path, monkeypatch):
    from hydra import compose, initialize
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.singleton import Singleton

    from gqa_parallel.conf import schema

    before = Singleton.get_state()
    schema.register()
    with initialize(config_path="../../../conf", version_base="1.3"):
        config = compose("config", overrides=["train.steps=7"], return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    try:
        write_hydra_record(tmp_path, {"train": {"steps": 7}}, ["train.steps=7"])
    finally:
        Singleton.set_state(before)
    recorded = OmegaConf.load(tmp_path / ".hydra" / "hydra.yaml")
    assert recorded.hydra.overrides.task == ["train.steps=7"]
    assert recorded.hydra.job.config_name == "config"
