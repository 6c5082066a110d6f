"""Weights & Biases, made safe: it never asks, never blocks, and never ends a training run."""

import functools
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_parallel.conf.schema import WandbConfig, WandbMode

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)

MODES = ("online", "offline", "disabled")


class Tracker:
    """A W&B run, or nothing. After the first error of W&B it warns once and does nothing more.

    Args:
        run: the started run; None where tracking is off.
    """

    def __init__(self, run: "wandb.Run | None" = None) -> None:
        self._run = run
        # a checkpoint stores it, so that a resumed run continues the same W&B run
        self.run_id: str | None = run.id if run else None
        self.run_folder: Path | None = Path(run.settings.sync_dir) if run else None
        self.mode: str = "disabled" if run is None else "offline" if run.offline else "online"
        self._url: str | None = run.url if run else None

    @property
    def where(self) -> str | None:
        """How to look at the run: its address, or the commands, one per line; None where tracking is off."""
        if self.run_folder is None:
            return None
        if self.mode == "online" and self._url:
            return self._url
        return f"wandb leet inspect {self.run_folder}\nwandb sync {self.run_folder}"

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log one row.

        Args:
            metrics: values by metric name.
            step: the horizontal axis, ``train/step``. After a resume it may be one that was logged before.
        """
        # not log(step=): W&B drops rows whose own step goes backwards
        self._safely(lambda run: run.log({"train/step": step, **metrics}))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set the run's final values."""
        self._safely(lambda run: run.summary.update(dict(values)))

    def finish(self, exit_code: int = 0) -> None:
        """End the run; an upload is given up after ``finish_timeout_s``, and the run folder keeps the rest.

        Args:
            exit_code: other than 0 marks the run as failed.
        """
        self._safely(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _safely(self, action: "Callable[[wandb.Run], object]") -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            self._run = None
            logger.warning("W&B failed, tracking is off from here: %s", _sentence(error))


def start_tracking(
    config: WandbConfig,
    run_dir: Path,
    resolved_config: Mapping[str, Any],
    head_table: Sequence[Mapping[str, Any]],
    run_id: str | None = None,
) -> Tracker:
    """Start a W&B run. Only rank 0 calls this.

    Args:
        config: the ``wandb`` group.
        run_dir: the run's directory; W&B's files go to ``run_dir/wandb``.
        resolved_config: the whole configuration as plain containers
            (``OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True, enum_to_str=True)``).
        head_table: a row per tensor-parallel rank, with the same keys; logged as table ``head_partition``.
        run_id: the id in the checkpoint of a run that goes on; None for a new one.

    Returns:
        The tracker. A start online that fails, or takes longer than ``init_timeout_s``, goes on offline
        with a warning; a start offline that fails gives a tracker that does nothing.
    """
    mode = _mode(config.mode)
    if mode == "disabled":
        return Tracker()
    start = functools.partial(_start, config, run_dir, resolved_config, head_table, run_id)
    try:
        _set_up(run_dir, config.init_timeout_s)
        if mode != "offline":
            try:
                if _key_found():
                    return start("online")
                if mode == "online":
                    logger.warning("no W&B key was found, tracking goes on offline: run wandb login")
            except Exception as error:
                logger.warning("W&B cannot be used online, tracking goes on offline: %s", _sentence(error))
        return start("offline")
    except Exception as error:
        logger.warning("W&B did not start, tracking is off: %s", _sentence(error))
        return Tracker()


def _mode(mode: WandbMode) -> str:
    """``mode``; where that is ``auto``, what ``WANDB_MODE`` says."""
    from_environment = os.environ.get("WANDB_MODE")
    return from_environment if mode is WandbMode.auto and from_environment in MODES else mode.value


def _set_up(run_dir: Path, timeout_s: float) -> None:
    """Set what wandb reads before a run exists: where files go, silence, and no wait for a server that hangs."""
    for name, value in {
        "WANDB_DATA_DIR": str(run_dir / "wandb" / "data"),  # not the home directory, which may be read-only
        "WANDB_CACHE_DIR": str(run_dir / "wandb" / "cache"),
        "WANDB_ERROR_REPORTING": "false",  # telemetry holds up the exit
        "WANDB_HTTP_TIMEOUT": str(math.ceil(timeout_s)),  # a table waits for the server
    }.items():
        os.environ.setdefault(name, value)
    import wandb

    # the viewer is who the user is, which init would ask before its own timeout starts
    wandb.setup(settings=wandb.Settings(silent=True, x_disable_viewer=True))


def _key_found() -> bool:
    """Whether wandb has credentials for its server: in the environment, netrc or its settings."""
    import wandb
    from wandb.sdk.lib import wbauth

    auth = wbauth.authenticate_session(
        host=wandb.setup().settings.base_url, source="gqa_parallel", prompt=False, update_session=False
    )
    return auth is not None


def _start(
    config: WandbConfig,
    run_dir: Path,
    resolved_config: Mapping[str, Any],
    head_table: Sequence[Mapping[str, Any]],
    run_id: str | None,
    mode: str,
) -> Tracker:
    import wandb

    run = wandb.init(
        mode=mode,
        project=config.project,
        entity=config.entity,
        name=config.name or run_dir.name,
        group=config.group,
        tags=list(config.tags),
        dir=str(run_dir),
        config=dict(resolved_config),
        id=run_id,
        resume="allow" if run_id else None,
        settings=wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            save_code=False,
            init_timeout=config.init_timeout_s,
            finish_timeout=config.finish_timeout_s,
            x_disable_viewer=True,
            x_transaction_log_flush_interval=1.0,  # seconds of rows that a kill may cost
        ),
    )
    run.define_metric("train/step")
    run.define_metric("*", step_metric="train/step")
    try:
        columns = list(head_table[0])
        rows = [[row[column] for column in columns] for row in head_table]
        run.log({"head_partition": wandb.Table(columns=columns, data=rows)})
    except Exception as error:  # online, a table asks the server; the run is worth more
        logger.warning("W&B did not take the table of heads: %s", _sentence(error))
    return Tracker(run)


def _sentence(error: Exception) -> str:
    """The error's first line, with its type, as some of wandb's have no text."""
    text = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
