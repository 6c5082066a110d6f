"""Logging of a run: a JSON-lines file per rank for everything, the console for rank 0's essentials."""

import json
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TextIO

OWN = "gqa_parallel"
# These do not pass their records on to the root logger; DeepSpeed's also prints them to stdout.
SECLUDED = ("DeepSpeed", "wandb")


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time (UTC), level, rank, logger, message; fields and traceback if any.

    Args:
        rank: global rank of this process.

    ``logger.info("saved", extra={"fields": {"step": 10}})`` gives the record its ``fields``.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "rank": self._rank,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if fields := getattr(record, "fields", None):
            entry["fields"] = fields
        if record.exc_info:
            entry["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(entry, default=str)


class ConsoleHandler(logging.StreamHandler):
    """Writes to the current ``sys.stderr``: a progress bar replaces it to keep lines above itself."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
        self.addFilter(_for_console)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, stream: TextIO) -> None:
        pass


def _for_file(record: logging.LogRecord) -> bool:
    """Our own records at their level, others from INFO on: wandb raises its logger's detail by itself."""
    return _package(record) == OWN or record.levelno >= logging.INFO


def _for_console(record: logging.LogRecord) -> bool:
    """Our own records, and what goes wrong elsewhere. Python's warnings are for developers: the file's."""
    return _package(record) == OWN or (record.name != "py.warnings" and record.levelno >= logging.WARNING)


def _package(record: logging.LogRecord) -> str:
    return record.name.partition(".")[0]


def log_path(run_dir: Path, rank: int) -> Path:
    """The log file of a rank."""
    return run_dir / "logs" / f"rank_{rank:05d}.jsonl"


@contextmanager
def logging_to(run_dir: Path, rank: int, level: str = "INFO") -> Iterator[Path]:
    """Log this process while the context lasts. Enter it after DeepSpeed is imported, which adds a handler.

    Args:
        run_dir: the run's directory.
        rank: global rank of this process; only rank 0 writes to the console.
        level: the lowest level of our own records. Those of other packages reach the file from
            INFO on, the console from WARNING on.

    Yields:
        The rank's log file, which is appended to. An exception that leaves the context is in it, with its
        traceback.
    """
    path = log_path(run_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    file_handler = logging.FileHandler(path, encoding="utf-8")
    file_handler.setFormatter(JsonFormatter(rank))
    file_handler.addFilter(_for_file)
    handlers = [file_handler, *([ConsoleHandler()] if rank == 0 else [])]

    secluded = [logging.getLogger(name) for name in SECLUDED]
    loggers = [logging.getLogger(), *secluded]
    own = logging.getLogger(OWN)
    before = [(logger, logger.level, logger.propagate, list(logger.handlers)) for logger in [*loggers, own]]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        # exactly StreamHandler: its subclasses write files
        logger.handlers = [h for h in logger.handlers if type(h) is not logging.StreamHandler] + handlers
    for logger in secluded:
        logger.propagate = False
    own.setLevel(level)
    logging.captureWarnings(True)
    try:
        yield path
    except BaseException as error:
        if not isinstance(error, SystemExit):
            # to the file alone: Python prints the traceback to the console
            message = f"uncaught {type(error).__name__}: {error}"
            file_handler.handle(own.makeRecord(OWN, logging.CRITICAL, "", 0, message, (), sys.exc_info()))
        raise
    finally:
        logging.captureWarnings(False)
        for logger, old_level, propagate, old_handlers in before:
            logger.setLevel(old_level)
            logger.propagate = propagate
            logger.handlers = old_handlers
        file_handler.close()
