# Copyright (c) The mokd_det authors.
"""What a run prints. Everything is in the ``log.txt`` of its OUTPUT_DIR, the config in a file."""

import argparse
import atexit
import contextlib
import functools
import logging
import os
import sys
from collections.abc import Iterator

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

from ..command_line import USUAL, VERBOSE, console_handlers
from ..files import naming
from .folder import CONFIG, output_errors

TALKATIVE = ("detectron2", "fvcore")
LOGGERS = (*TALKATIVE, "mokd_det")
# Of these what a person reads. The rest is the environment, the config, models, weights
# name by name, tables of classes.
SHOWN = (
    "detectron2.engine.hooks",
    "detectron2.engine.train_loop",
    "detectron2.evaluation.evaluator",
    "detectron2.evaluation.testing",
    "detectron2.utils.events",
    "fvcore.common.checkpoint",
)


def start_logs(cfg: CfgNode | DictConfig, folder: str, args: argparse.Namespace) -> None:
    """
    Start the loggers, write the config to ``folder`` and set the seed, as Detectron2 does.
    SystemExit, with a message: the folder cannot be written.
    """
    with output_errors(folder), raises_os_errors(), naming(os.path.join(folder, CONFIG)):
        setup_console(folder, args.verbosity)
        default_setup(cfg, args)


def setup_console(folder: str, verbosity: int) -> None:
    """Start the loggers as Detectron2's ``default_setup`` does, which follows, and limit them."""
    rank = comm.get_rank()
    # The same calls as there: it gives a logger no second handler then.
    setup_logger(folder, distributed_rank=rank, name="fvcore")
    setup_logger(folder, distributed_rank=rank)
    setup_logger(folder, rank, name="mokd_det", abbrev_name="mokd")
    for log_file in _file_handlers():
        log_file.handleError = functools.partial(_raise, log_file)  # type: ignore[method-assign]
    for handler in console_handlers():
        for earlier in [f for f in handler.filters if isinstance(f, ConsoleFilter)]:
            handler.removeFilter(earlier)
        handler.addFilter(ConsoleFilter(verbosity))


def _file_handlers() -> set[logging.StreamHandler]:
    handlers = {h for name in LOGGERS for h in logging.getLogger(name).handlers}
    streams = {h for h in handlers if isinstance(h, logging.StreamHandler)}
    return streams - console_handlers()


def _raise(handler: logging.StreamHandler, record: logging.LogRecord) -> None:
    """In place of a traceback for each line that cannot be written."""
    error = sys.exc_info()[1]
    if not (isinstance(error, OSError) and logging.raiseExceptions):
        logging.Handler.handleError(handler, record)
        return
    atexit.unregister(handler.stream.close)  # Detectron2's; it would try once more
    with naming(handler.stream.name):
        raise error


class ConsoleFilter(logging.Filter):
    """Lets through what a console of this verbosity shows."""

    def __init__(self, verbosity: int):
        super().__init__()
        self.verbosity = verbosity

    def filter(self, record: logging.LogRecord) -> bool:
        if self.verbosity == VERBOSE or record.levelno >= logging.WARNING:
            return True
        is_noise = record.name.split(".")[0] in TALKATIVE and record.name not in SHOWN
        # Detectron2's checkpointer, whatever weights the backbone has: the summary says which.
        is_noise |= record.getMessage().startswith("No checkpoint found")
        return self.verbosity == USUAL and record.levelno >= logging.INFO and not is_noise


@contextlib.contextmanager
def raises_os_errors() -> Iterator[None]:
    """Within it, LazyConfig.save raises that a file cannot be written: it only logs that."""
    log = logging.getLogger("detectron2.config.lazy")
    log.addFilter(_raise_os_error)
    try:
        yield
    finally:
        log.removeFilter(_raise_os_error)


def _raise_os_error(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, OSError):
        raise error
    return True
