"""Every file of ``conf/`` composes, says how to use it, and describes a model that the partition admits."""

import copy
import functools
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from gqa_parallel import conf
from gqa_parallel.conf import schema
from gqa_parallel.conf.checks import check
from gqa_parallel.partition.heads import HeadPartition

CONF = Path(conf.__file__).parent
OPTIONS = sorted(path.relative_to(CONF) for path in CONF.glob("*/*.yaml"))
FILES = [*OPTIONS, Path("config.yaml")]
MODELS = [path.stem for path in OPTIONS if path.parts[0] == "model"]
# keys that gqa-plan has besides the schema's
PLAN_KEYS = ("world_size",)


def composed(*overrides: str) -> schema.Config:
    return copy.deepcopy(_composed(overrides))


@functools.cache
def _composed(overrides: tuple[str, ...]) -> schema.Config:
    schema.register()
    with initialize_config_module("gqa_parallel.conf", version_base="1.3"):
        return OmegaConf.to_object(compose("config", list(overrides)))


def choice(option: Path) -> str:
    group = option.parts[0]
    sign = "+" if group not in {field.name for field in fields(schema.Config)} else ""
    return f"{sign}{group}={option.stem}"


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_option_composes(option):
    # a list cannot say that it must be given: its element does
    composed(choice(option), *(["data.paths=[data/corpus]"] if option == Path("data/indexed.yaml") else []))


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_file_opens_with_a_command_that_composes(file):
    lines = (CONF / file).read_text().splitlines()
    first = lines[lines[0].startswith("# @package")]  # which Hydra reads on the first line only
    assert re.match(r"# (gqa-[a-z-]+|torchrun .* -m gqa_parallel\.launch\.\w+)( |$)", first), first
    words = shlex.split(first.removeprefix("# "))
    overrides = [word for word in words if re.match(r"[+~a-z][\w.]*=", word)]
    composed(*(word for word in overrides if not word.startswith(PLAN_KEYS)))


def test_the_defaults_run_on_one_rank():
    check(composed(), world_size=1)


@pytest.mark.parametrize("name", MODELS)
def test_models_are_sound(name):
    config = composed(f"model={name}")
    config.train.seq_len = min(config.train.seq_len, config.model.max_position_embeddings)
    assert config.model.name
    for tp_size in (1, 2, 4):
        config.parallel.tp = tp_size
        check(config, world_size=2 * tp_size)
    for tp_size in range(1, min(16, config.model.num_heads) + 1):
        HeadPartition(config.model.num_heads, config.model.num_kv_heads, tp_size)
