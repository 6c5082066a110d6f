"""What every program shares: Hydra around it, checked keys, and one clear message for what a user got wrong."""

import dataclasses
import difflib
import functools
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gqa_parallel.errors import UserError

USER_ERROR_EXIT_CODE = 2
# of Hydra's messages; the last one advises what check_keys refuses
HYDRA_NOISE = ("object_type=", "reference_type=", "Config search path:", "provider=", "To append to your config use +")
C = TypeVar("C")


def program(
    schema: type[C], config_name: str, distributed: bool = False
) -> Callable[[Callable[[C], None]], Callable[[], None]]:
    """Make ``task(config)`` a program that takes Hydra overrides.

    Args:
        schema: the dataclass that lists every admissible key; ``+new=1`` cannot add others. ``task`` gets an instance.
        config_name: the primary file in ``conf/``.
        distributed: torchrun starts it on several ranks; it then shows the traceback of the rank that failed first.

    A ``UserError``, or a configuration that Hydra cannot compose, ends the program with exit code 2 and its
    message, without a traceback; of the ranks of a node only the first to fail prints it.
    """

    def decorate(task: Callable[[C], None]) -> Callable[[], None]:
        @functools.wraps(task)
        def checked(cfg: DictConfig) -> None:
            try:
                check_keys(cfg, schema)
                task(OmegaConf.to_object(cfg))
            except UserError as error:  # before Hydra adds its own lines to it
                end_with(error)

        if distributed:
            from torch.distributed.elastic.multiprocessing.errors import record

            checked = record(checked)  # inside Hydra's wrapper, which would take the exception away from it
        run = hydra.main(version_base="1.3", config_path="../conf", config_name=config_name)(checked)

        @functools.wraps(task)
        def main() -> None:
            refuse_sweep_under_torchrun(sys.argv[1:])
            # Hydra then raises instead of printing, once per rank, what it has to say
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")
            try:
                run()
            except (HydraException, OmegaConfBaseException) as error:
                end_with(_misspelt(error, schema) or error)

        return main

    return decorate


def end_with(error: Exception) -> None:
    """Print the message of a user's mistake and exit with code 2."""
    if _first_of_node():
        print(f"\nerror: {_message(error)}", file=sys.stderr, flush=True)
    sys.exit(USER_ERROR_EXIT_CODE)


def _first_of_node() -> bool:
    """Whether no rank of this node has failed before this one: torchrun ends the others, whichever they are."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # FOLDER/LOCAL_RANK/error.json
    if not error_file:
        return True
    try:
        Path(error_file).parents[1].joinpath("user_error").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # rather twice than never
        pass
    return True


def _message(error: Exception) -> str:
    """A user error's own sentence; Hydra's with its cause, without the lines that place it in code."""
    if isinstance(error, UserError):
        return str(error)
    texts = [str(error)]
    if error.__cause__ is not None and str(error.__cause__) not in texts[0]:
        texts.append(str(error.__cause__))
    lines = [line.strip() for text in texts for line in text.splitlines()]
    return "\n  ".join(line for line in lines if line and not line.startswith(HYDRA_NOISE))


def check_keys(cfg: DictConfig, schema: type) -> None:
    """Refuse keys that ``schema`` does not have: OmegaConf lets ``+new=1`` through.

    Raises:
        UserError: names the key and the nearest known ones.
    """
    known = set(_known_keys(schema))
    for key in _keys(cfg):
        if key not in known:
            raise _unknown_key(key, known)


def _unknown_key(key: str, known: Iterable[str]) -> UserError:
    near = difflib.get_close_matches(key, known, n=3)
    hint = f"Did you mean {' or '.join(near)}?" if near else "See the files of conf/ for all keys."
    return UserError(f"unknown key {key}: no part of the configuration reads it. {hint}")


def _misspelt(error: Exception, schema: type) -> UserError | None:
    """What Hydra says of an override whose key does not exist, with the keys that come near; None for other errors."""
    found = re.match(r"Could not override '([\w.]+)'", str(error))
    known = {field.name for field in dataclasses.fields(schema)} | set(_known_keys(schema))
    return _unknown_key(found[1], known) if found and found[1] not in known else None


def _keys(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    for name in cfg:
        node = cfg._get_node(name)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            yield from _keys(node, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _known_keys(schema: type, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(field.type):
            yield from _known_keys(field.type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def refuse_sweep_under_torchrun(arguments: list[str]) -> None:
    """A sweep inside torchrun would run on every rank, in one process, one job after the other."""
    if "TORCHELASTIC_RUN_ID" in os.environ and {"-m", "--multirun"} & set(arguments):
        end_with(
            UserError(
                "--multirun must not run inside torchrun: every rank would start the whole sweep. "
                "Sweep outside, one torchrun per job (docs/running.md)."
            )
        )


warnings.filterwarnings("ignore", category=UserWarning, module="hydra")
