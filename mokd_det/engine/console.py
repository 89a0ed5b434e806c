# Copyright (c) The mokd_det authors.
"""What a run prints. Everything is in the ``log.txt`` of its OUTPUT_DIR, the config in a file."""

import logging

from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..command_line import USUAL, VERBOSE, console_handlers

TALKATIVE = ("detectron2", "fvcore")
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


def setup_console(cfg: CfgNode, verbosity: int) -> None:
    """Start the loggers as Detectron2's ``default_setup`` does, which follows, and limit them."""
    rank = comm.get_rank()
    # The same calls as there: it gives a logger no second handler then.
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name="fvcore")
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank)
    setup_logger(cfg.OUTPUT_DIR, rank, name="mokd_det", abbrev_name="mokd")
    for handler in console_handlers():
        for earlier in [f for f in handler.filters if isinstance(f, ConsoleFilter)]:
            handler.removeFilter(earlier)
        handler.addFilter(ConsoleFilter(verbosity))


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
